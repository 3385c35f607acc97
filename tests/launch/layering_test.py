#!/usr/bin/env python3
"""The shape of the tree: includes point one way, core knows no ranks, files stay short, the top level stays plain."""
import pathlib
import re
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
ORDER = ["core", "parallel", "plugins", "launch"]  # each may include itself and what stands before it
CODE = {".cpp", ".h", ".cu", ".cuh", ".in"}
TEXT = CODE | {".py", ".sh", ".txt", ".md", ".yaml", ".cmake"}
MAX_LINES = 500
MAX_LOGIC = 15  # of a strategy's file
FOLDERS = {"core", "parallel", "plugins", "launch", "configs", "tests", "docs", "cmake", ".ci", ".git", "build", "runs", "shared"}
FILES = {"CMakeLists.txt", "CMakePresets.json", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "CONTRIBUTING.md",
         "pyproject.toml", ".clang-format", ".clang-tidy", ".gitignore", ".gitattributes", ".git"}
RANK = re.compile(r"(?<![a-z])(\w+_)?ranks?(_\w*)?(?![a-z])", re.IGNORECASE)


def files_of(folder, suffixes):
    skip = {"build", "__pycache__", "corpus"}
    for path in sorted((ROOT / folder).rglob("*")):
        if path.is_file() and path.suffix in suffixes and not skip & set(path.relative_to(ROOT).parts):
            yield path


def upward_includes(folder, text):
    """(line, include) of every include that leaves `folder`'s side of the order."""
    for number, line in enumerate(text.splitlines(), 1):
        match = re.match(r'\s*#\s*include\s*"([^"/]+)/', line)
        if not match:
            continue
        target = match.group(1)
        if target == "tests" or (target in ORDER and ORDER.index(target) > ORDER.index(folder)):
            yield number, line.strip()


def rank_identifiers(text):
    """Words about ranks in code; comments and strings may speak of them."""
    text = re.sub(r'"(\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', lambda m: "\n" * m.group().count("\n"), text, flags=re.S)
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#"):
            continue
        for match in RANK.finditer(line):
            yield number, match.group()


def type_definitions(text):
    """Names of the classes, structs and enums defined at file scope, specialisations left out."""
    return re.findall(r"^(?:struct|class|enum class) (\w+)(?: final)?(?: :[^:{;][^{;]*)? \{", text, flags=re.M)


def lines_of_logic(text):
    """Lines of a C++ file that say something: no comments, includes, namespaces, nor brackets alone."""
    text = re.sub(r"//[^\n]*", "", text)
    return [line for line in text.splitlines()
            if re.search(r"\w", line) and not re.match(r"\s*#\s*include|namespace |using namespace ", line)]


class Layering(unittest.TestCase):
    def test_includes_point_from_launch_to_core(self):
        bad = [f"{path.relative_to(ROOT)}:{number}: {line}" for folder in ORDER for path in files_of(folder, CODE)
               for number, line in upward_includes(folder, path.read_text())]
        self.assertFalse(bad, "upward includes (core <- parallel <- plugins <- launch):\n" + "\n".join(bad))

    def test_core_knows_no_ranks(self):
        # A config describes meshes, so core/config may name them.
        bad = [f"{path.relative_to(ROOT)}:{number}: {word}" for path in files_of("core", CODE)
               if "core/config/" not in path.as_posix() for number, word in rank_identifiers(path.read_text())]
        self.assertFalse(bad, "core is one device and knows no ranks:\n" + "\n".join(bad))

    def test_a_type_is_defined_once(self):
        # Two types of one name in one namespace break the one-definition rule without a word from the linker. The text of
        # the CPU kernels lives in namespaces of its own.
        places = {}
        for folder in ORDER:
            for path in files_of(folder, {".h"}):
                if "core/attention/cpu/" in path.as_posix():
                    continue
                for name in type_definitions(path.read_text()):
                    places.setdefault(name, []).append(str(path.relative_to(ROOT)))
        twice = [f"{name}: {', '.join(files)}" for name, files in places.items() if len(files) > 1]
        self.assertFalse(twice, "types of one name in several headers:\n" + "\n".join(twice))

    def test_files_can_be_read_in_one_sitting(self):
        long = []
        for folder in [*ORDER, "tests", "docs", "configs", ".ci"]:
            for path in files_of(folder, TEXT):
                lines = path.read_text().count("\n")
                if lines > MAX_LINES:
                    long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        self.assertFalse(long, f"longer than {MAX_LINES} lines; cut them along a seam:\n" + "\n".join(long))

    def test_a_strategy_is_fifteen_lines_of_logic(self):
        files = list(files_of("parallel/strategies", {".cpp"}))
        self.assertGreaterEqual(len(files), 12)
        long = [f"{path.name}: {len(logic)}" for path in files if len(logic := lines_of_logic(path.read_text())) > MAX_LOGIC]
        self.assertFalse(long, f"more than {MAX_LOGIC} lines of logic; what is generic belongs into strategies/compose.h or "
                               f"requirements.h: {long}")

    def test_top_level_holds_only_the_known_folders(self):
        unknown = [entry.name for entry in ROOT.iterdir()
                   if entry.name not in (FOLDERS if entry.is_dir() else FILES) and not entry.name.endswith(".swp")]
        self.assertFalse(unknown, f"unknown entries at the top level: {sorted(unknown)}")

    def test_the_rules_can_fail(self):
        self.assertTrue(list(upward_includes("core", '#include "parallel/mesh.h"\n')))
        self.assertTrue(list(upward_includes("plugins", '#  include "launch/bootstrap.h"\n')))
        self.assertFalse(list(upward_includes("launch", '#include "plugins/train/loop.h"\n#include "core/base/log.h"\n')))
        words = [word for _, word in rank_identifiers('int rank; f(num_ranks); g(rank_); "rank 3/8" // rank\nfranking();')]
        self.assertEqual(words, ["rank", "num_ranks", "rank_"])
        self.assertEqual(type_definitions("struct A {\nclass B final : public A {\nstruct C<int> {\nstruct D;\nenum class E : int {\n"),
                         ["A", "B", "E"])
        self.assertEqual(lines_of_logic('// a\n#include "b.h"\nnamespace c {\n\nint d() {  // e\n  return 1;\n}\n}  // namespace c\n'),
                         ["int d() {  ", "  return 1;"])


if __name__ == "__main__":
    unittest.main()

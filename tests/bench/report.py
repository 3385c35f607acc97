"""Markdown tables and the plot of what compare.py measured: functions of compare.json's content alone."""
import re
import statistics


def counted(result):
    """The rounds of a result that count (see compare.py)."""
    return [round_ for round_ in result["rounds"] if round_["counts"]]


def median(result, side, value):
    """The median over the rounds of value(what the side printed, the round); None where the side has no figure."""
    values = [value(round_["sides"][side], round_) for round_ in counted(result) if side in round_["sides"]]
    return statistics.median(values) if values and None not in values else None


def milliseconds(result, side, which=None):
    def p50(printed, _):
        times = printed["milliseconds"]
        return (times[which] if which else times)["p50"]
    return median(result, side, p50)


def attention_flops(what, which):
    """4 * seq^2 * dim * heads forward, by visible area when causal, and 2.5 times that backward."""
    pairs = what["seq"] * (what["seq"] + 1) / 2 if what["mask"] == "causal" else what["seq"] ** 2
    return 4 * pairs * what["dim"] * what["heads"] * {"forward": 1, "backward": 2.5}[which]


def gflops(result, side, which):
    time = milliseconds(result, side, which)
    return None if time is None else attention_flops(result["what"], which) / time * 1e-6


def share(result, side, rate, name="of_peak"):
    """Of the peak beside each call, where the side measures that itself and prints it as `name`; else of the round's. rate(what
    the side printed) in GFLOP/s."""
    def of_peak(printed, round_):
        if name in printed:
            return printed[name]
        return rate(printed) / round_["peak"] if round_["peak"] else None
    return median(result, side, of_peak)


def attention_share(result, side, which):
    flops = attention_flops(result["what"], which)
    return share(result, side, lambda printed: flops / printed["milliseconds"][which]["p50"] * 1e-6, f"{which}_of_peak")


def number(value, digits=0):
    return "" if value is None else f"{value:.{digits}f}"


def percent(value):
    return "" if value is None else f"{value * 100:.0f} %"


def rated(value, of_peak, digits=0):
    return number(value, digits) + (f" ({percent(of_peak)})" if of_peak is not None else "")


def ratio(over, under):
    return "" if over is None or under is None else f"{over / under:.2f}"


def binary(seq):
    return f"{seq // 1024}k" if seq % 1024 == 0 else str(seq)


def label(result, text):
    """A row's first cell, with a star where too few rounds had a steady peak."""
    return text if result["steady"] else f"{text} *"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def notes(results):
    """What a reader of the table must know: empty cells and stars."""
    reasons = sorted({f"{side}: {reason}" for result in results for side, reason in result["failed"].items()})
    lines = [f"No figure from {reason}." for reason in reasons]
    restless = [result for result in results if not result["steady"]]
    if restless:
        least = min(sum(not round_["moved"] for round_ in result["rounds"]) for result in restless)
        most = max(len(result["rounds"]) for result in restless)
        lines.append(f"\\* The peak moved by more than 5 % in too many rounds ({least} steady ones of {most} at worst): the "
                     "rounds in which it moved least were taken.")
    return lines


def about_line(about):
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return (f"{about['date']}, {about['cpu']}, {about['cores']} cores, commit {about['commit']}; {versions}; medians of "
            f"{about['rounds']} interleaved rounds{', processor time' if about['cpu_time'] else ''}.")


def write_block(page, name, text):
    """Puts text between the markers of that name, on the page or one beside it whose name begins alike; where none has them, the
    page gets them at its end."""
    start, end = f"<!-- compare.py: {name} -->", "<!-- end -->"
    page = next((other for other in sorted(page.parent.glob(page.stem + "*.md")) if start in other.read_text()), page)
    content = page.read_text() if page.exists() else "# Benchmarks\n"
    if start not in content:
        content += f"\n## Compared: {name}\n\n{start}\n{end}\n"
    pattern = re.compile(re.escape(start) + r".*?" + re.escape(end), re.DOTALL)
    page.write_text(pattern.sub(lambda _: f"{start}\n\n{text}\n\n{end}", content, count=1))


def plot(results, to):
    """GFLOP/s by seq: a panel for each type and pass, causal masks; dashes for the smaller head dim. False without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "dattn", "font.size": 9})  # text; the same ids always
    from matplotlib import pyplot
    drawn = [result for result in results if result["what"]["mask"] == "causal"] or results
    types = sorted({result["what"]["dtype"] for result in drawn}, reverse=True)
    dims = sorted({result["what"]["dim"] for result in drawn})
    figure, panels = pyplot.subplots(len(types), 2, figsize=(8, 2.7 * len(types) + 0.5), squeeze=False, sharex=True)
    for row, dtype in zip(panels, types):
        for panel, which in zip(row, ("forward", "backward")):
            for side, color in (("ours", "#0b6e99"), ("PyTorch", "#d9730d")):
                for dim, style in zip(dims, ("--", "-", ":", "-.")):
                    points = [(result["what"]["seq"], gflops(result, side, which)) for result in drawn
                              if result["what"]["dtype"] == dtype and result["what"]["dim"] == dim]
                    points = sorted(point for point in points if point[1] is not None)
                    if points:
                        panel.plot(*zip(*points), style, color=color, marker="o", markersize=3, label=f"{side}, D {dim}")
            peaks = [round_["peak"] for result in drawn if result["what"]["dtype"] == dtype for round_ in counted(result)
                     if round_["peak"]]
            if peaks:
                panel.axhline(statistics.median(peaks), color="#777777", linewidth=0.8, label="measured peak")
            panel.set(title=f"{dtype} {which}, {drawn[0]['what']['mask']}", xscale="log", ylim=(0, None), ylabel="GFLOP/s")
            seqs = sorted({result["what"]["seq"] for result in drawn})
            panel.set_xticks(seqs, [binary(seq) for seq in seqs], minor=False)
            panel.set_xticks([], minor=True)
            panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel("sequence length")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(to, metadata={"Date": None})
    pyplot.close(figure)
    return True

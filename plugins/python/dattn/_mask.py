"""Masks as users give them, in the words of the YAML (configs/SCHEMA.md), for every framework."""
from dattn import _c


def plain_mask(mask, plain_value, hint=lambda mask: ""):
    """A mask as the YAML has it: kinds by name may stand for masks of that kind. plain_value(value, name): an entry as numbers,
    texts and lists. hint(mask): ends the message for one that is neither a name nor a dict."""
    if mask is None:
        return {"kind": "full"}
    if isinstance(mask, str):
        return {"kind": mask}
    if not isinstance(mask, dict):
        raise _c.BadInput(f"mask is a {type(mask).__name__}; give a kind's name or a dict{hint(mask)}")
    plain = {}
    for name, value in mask.items():
        if name == "within":
            value = plain_mask(value, plain_value, hint)
        elif name == "masks":
            value = [plain_mask(one, plain_value, hint) for one in value]
        plain[name] = plain_value(value, f"mask key '{name}'")
    return plain

"""The parser of a command that its module's docstring describes."""

import argparse


def make_parser(prog: str, doc: str | None, note: str = "") -> argparse.ArgumentParser:
    """Return a parser whose help shows the docstring's first paragraph above the options and the others below.

    doc: `__doc__` of the module; its second paragraph holds examples. note: what follows the docstring.
    """
    summary, _, examples = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=prog,
        description=summary,
        epilog=f"examples:\n{examples}{note}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

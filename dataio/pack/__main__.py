"""The command `python -m dataio.pack SOURCE TARGET`, which writes shards and their manifest."""

import argparse
import sys
import time
from pathlib import Path

from dataio.files import FolderLockedError, escape_unprintable, staging_folder, user_path
from dataio.manifest import MANIFEST_NAME, SkippedFile
from dataio.options import add_renamed_flag
from dataio.pack.options import SPLITS, PackOptions, add_options
from dataio.pack.packer import REPORT_NAME, PackReport, pack, read_report

_BROKEN_SHOWN, _NAMES_SHOWN = 20, 3


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dataio.pack",
        description="Packs images into shards for training. The same images and options give the same bytes again,"
        " whatever the number of workers. Killed, or stopped by Ctrl-C, the same command resumes from the finished"
        " shards; with other options or a changed SOURCE it starts over.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        type=user_path,
        help="a folder with a folder of images per class; a zip or (uncompressed) tar of one; a WebDataset: a folder"
        " of .tar shards, one of them, or a pattern in quotes like 'shard-{000000..000041}.tar'",
    )
    parser.add_argument("target", metavar="TARGET", type=user_path, help="folder to write, new or empty")
    add_options(parser)
    parser.add_argument(
        "--split",
        choices=SPLITS,
        help="which split to pack: val has PERCENT of each class, train the others",
    )
    add_renamed_flag(parser, "--part", "--split train or val")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = vars(_parse(argv))
    source, target = arguments.pop("source"), arguments.pop("target")
    start = time.monotonic()
    try:
        manifest = pack(source, target, PackOptions(**arguments))
    except (ValueError, RuntimeError, OSError) as error:
        hint = [] if isinstance(error, FolderLockedError) else _resume_hint(target)
        print("\n".join([f"error: {error}", *hint]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("; ".join([f"interrupted; {target} is not written", *_resume_hint(target)]), file=sys.stderr)
        return 130
    _print_unusual(read_report(target), manifest.broken)
    size = sum(shard.bytes for shard in manifest.shards) / 2**20
    print(
        f"packed {target}: samples {len(manifest)}, classes {len(manifest.classes)}, shards"
        f" {len(manifest.shards)}, {size:.1f} MiB; in {time.monotonic() - start:.1f} s"
    )
    return 0


def _resume_hint(target: Path) -> list[str]:
    """Return the line that tells where finished shards are kept, if there are any."""
    partial = staging_folder(target)
    if not partial.exists():
        return []
    return [f"finished shards are kept in {partial}, and the same command resumes from them"]


def _print_unusual(report: PackReport, broken: tuple[SkippedFile, ...]) -> None:
    """Print the unusual images of a pack, and the files that were skipped, to standard error."""
    unusual = {
        "CMYK images, trained on as RGB": report.cmyk,
        "images whose EXIF asks for a rotation, trained on as stored": report.rotated,
    }
    for kind, paths in unusual.items():
        if paths:
            more = f", …; {REPORT_NAME} lists them all" if len(paths) > _NAMES_SHOWN else ""
            shown = ", ".join(map(escape_unprintable, paths[:_NAMES_SHOWN]))
            print(f"{kind}: {len(paths)} ({shown}{more})", file=sys.stderr)
    for file in broken[:_BROKEN_SHOWN]:
        print(f"skipped {escape_unprintable(file.file)}: {file.reason}", file=sys.stderr)
    if broken:
        more = f", {_BROKEN_SHOWN} of them shown" if len(broken) > _BROKEN_SHOWN else ""
        print(f"skipped {len(broken)} broken files{more}; {MANIFEST_NAME} lists them all", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

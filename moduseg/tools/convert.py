"""The command `convert_proposals`: maps of ids, or folders of masks, become files in the annotation format of SA-1B."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moduseg.config.command_keys import ConvertOptions
from moduseg.errors import DataError, MissingError
from moduseg.files import write_atomic
from moduseg.progress import track
from moduseg.proposers.id_maps import SUFFIXES, read_id_map
from moduseg.proposers.mask_folders import TABLE, read_mask_folder
from moduseg.proposers.sa1b import dump, to_annotations


def main(options: ConvertOptions, overrides: Sequence[str] = ()) -> int:
    """Convert a folder; 1 if maps could not be read, after a line for each, else 0."""
    conversion = convert_folder(Path(options.source), Path(options.out))
    for message in conversion.failed.values():
        print(f"left out: {message}", file=sys.stderr)
    print(
        f"{conversion.written} written, {conversion.kept} kept, {len(conversion.failed)} left out; proposals are in "
        f"{options.out}"
    )
    return 1 if conversion.failed else 0


@dataclass(frozen=True)
class Conversion:
    """What `convert_folder` did.

    Attributes:
        written: files written now.
        kept: files that an earlier run wrote and whose map has not changed since.
        failed: what was wrong, by path of the map.
    """

    written: int
    kept: int
    failed: dict[str, str]


def convert_folder(source: Path, out: Path) -> Conversion:
    """Write `<out>/<id>.json` for every `<source>/<id>.npz` and `<source>/<id>.png`, sub-folders included.

    A sub-folder with `metadata.csv` is one image, its PNGs are masks; see `moduseg.proposers.mask_folders`. Each file
    is intact or absent, and one that is newer than its map is kept, so that a run that was stopped continues where it
    was. A map that cannot be read costs its own file only.

    Args:
        source: the folder of maps; see `moduseg.proposers.id_maps`.
        out: the folder to write to, made if it is not there.

    Raises:
        MissingError: no such folder, or no map in it.
        DataError: two maps of one id.
        StorageError: a file cannot be written.
    """
    if not source.is_dir():
        raise MissingError(f"{source}: no such folder; name the folder of .npz or .png maps")
    folders = {table.parent for table in source.rglob(TABLE) if table.parent != source}
    maps: dict[str, Path] = {folder.relative_to(source).as_posix(): folder / TABLE for folder in sorted(folders)}
    for path in sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        if path.parent in folders:
            continue
        image_id = path.relative_to(source).with_suffix("").as_posix()
        if image_id in maps:
            raise DataError(f"{path}: a second map of {image_id!r} beside {maps[image_id].name}; keep one of them")
        maps[image_id] = path
    if not maps:
        raise MissingError(f"{source}: no {' or '.join(SUFFIXES)} file in it; name the folder of the maps")
    num_written, num_kept = 0, 0
    failed: dict[str, str] = {}
    for image_id, path in track(maps.items(), "convert", unit="file"):
        target = out / f"{image_id}.json"
        if target.is_file() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns:
            num_kept += 1
            continue
        try:
            proposals = read_mask_folder(path.parent) if path.name == TABLE else read_id_map(path)
            data = dump(to_annotations(proposals, image_id))
        except DataError as error:
            failed[str(path)] = str(error)
            continue
        write_atomic(target, data)
        num_written += 1
    return Conversion(num_written, num_kept, failed)

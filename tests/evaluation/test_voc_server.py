from __future__ import annotations

import io
import tarfile

from moduseg.evaluation.voc_server import archive_path, pack


def test_paths_are_those_that_the_server_reads() -> None:
    assert archive_path("test", "2008_000006") == "results/VOC2012/Segmentation/comp6_test_cls/2008_000006.png"


def test_the_same_files_give_the_same_bytes_in_any_order() -> None:
    files = [(archive_path("test", name), name.encode() * 50) for name in ("b", "a", "c")]
    data = pack(files)
    assert pack(reversed(files)) == data
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:gz") as archive:
        entries = archive.getmembers()
        assert [e.name for e in entries] == sorted(name for name, _ in files)
        assert {(e.mtime, e.uid, e.gid, e.uname, e.gname, e.mode) for e in entries} == {(0, 0, 0, "", "", 0o644)}
        for name, content in files:
            extracted = archive.extractfile(name)
            assert extracted is not None
            assert extracted.read() == content
    assert data[4:8] == bytes(4)  # the time in the header of gzip

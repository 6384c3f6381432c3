from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from wagontrain.errors import WorkerError
from wagontrain.ray_engine.mirror import Copy, Original, Piece


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("original", "copy"):
        (tmp_path / name).mkdir()
    return tmp_path / "original", tmp_path / "copy"


def send(original: Original, copy: Copy, most: int) -> int:
    """Send all there is, so many bytes at once; returns how many bytes went."""
    sent = 0
    while pieces := original.pieces(most):
        assert sum(len(piece.content) for piece in pieces) <= most
        for piece in pieces:
            copy.put(piece)
            sent += len(piece.content)
    return sent


@pytest.mark.parametrize("most", [1, 7, 1 << 20])
def test_the_copy_becomes_what_the_original_is(folders: tuple[Path, Path], most: int) -> None:
    here, there = folders
    original, copy = Original(here), Copy(there)
    assert original.pieces() == []
    (here / "events.jsonl").write_bytes(b"first\n")
    (here / "empty").touch()
    (here / "deep" / "er").mkdir(parents=True)
    (here / "deep" / "er" / "weights").write_bytes(bytes(range(50)))
    (here / "deep" / "unfinished.part").write_bytes(b"not to be sent")
    assert send(original, copy, most) == 56
    assert files(there) == {
        "events.jsonl": b"first\n", "empty": b"", "deep/er/weights": bytes(range(50))
    }  # fmt: skip
    with (here / "events.jsonl").open("ab") as file:
        file.write(b"second\n")
    assert send(original, copy, most) == 7
    (here / "deep" / "unfinished.part").replace(here / "deep" / "er" / "weights")
    assert send(original, copy, most) == 14
    assert files(there) == files(here)
    (here / "empty").unlink()
    assert send(original, copy, most) == 0
    original.close()


def test_a_file_replaced_while_it_is_sent(folders: tuple[Path, Path]) -> None:
    here, there = folders
    original, copy = Original(here), Copy(there)
    (here / "weights").write_bytes(b"a" * 10)
    send(original, copy, 100)
    for content in (b"b" * 10, b"c" * 10):
        (here / "weights.part").write_bytes(content)
        (here / "weights.part").replace(here / "weights")
        for piece in original.pieces(6):
            copy.put(piece)
        assert (there / "weights").read_bytes() == b"a" * 10  # the old one, whole
    send(original, copy, 6)
    assert files(there) == {"weights": b"c" * 10}
    original.close()


def test_small_files_do_not_wait_for_large_ones(folders: tuple[Path, Path]) -> None:
    original = Original(folders[0])
    (folders[0] / "a-large-one").write_bytes(bytes(1000))
    (folders[0] / "event").write_bytes(b"now")
    assert original.pieces(100)[0] == Piece("event", 0, b"now", whole=True)
    original.close()


def test_nothing_is_put_outside(folders: tuple[Path, Path]) -> None:
    with pytest.raises(WorkerError, match="outside the run directory"):
        Copy(folders[1]).put(Piece("../other", 0, b"", whole=True))


def test_folders_that_go_meanwhile_are_no_error(folders: tuple[Path, Path]) -> None:
    """As a checkpoint does when a later one is whole."""
    here, _ = folders
    original = Original(here)
    over = threading.Event()

    def come_and_go() -> None:
        while not over.is_set():
            folder = here / "checkpoints" / "step-96" / "weights"
            folder.mkdir(parents=True)
            (folder / "rank0").write_bytes(b"weights")
            shutil.rmtree(here / "checkpoints")

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(1000):
            assert {piece.name for piece in original.pieces()} <= {
                "checkpoints/step-96/weights/rank0"
            }
    finally:
        over.set()
        thread.join()
        original.close()

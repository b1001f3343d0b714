"""Token store: what it holds, found again by content, and whole or not there whatever happens to its builder."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from bert6_jax.data import store as store_module
from bert6_jax.data.sources import TextSource, open_source
from bert6_jax.data.store import build_store, default_cache_dir, open_store
from bert6_jax.data.tokenizer import SPECIALS, wordpiece
from bert6_jax.errors import InputError

WORDS = [f"w{i}" for i in range(50)]
TOKENIZER = wordpiece((*SPECIALS, *WORDS))
TEXTS = [" ".join(WORDS[(7 * i + k) % 50] for k in range(i % 13)) + " zebra" * (i % 3) for i in range(200)]


class Unreadable(TextSource):
    def documents(self):
        raise AssertionError("the text was read again")


def source(texts=TEXTS, fingerprint="f", kind=TextSource):
    return kind("texts", texts, fingerprint)


def assert_holds(store, texts=TEXTS, tokenizer=TOKENIZER):
    expected = tokenizer.encode_batch(texts)
    assert store.num_documents == len(texts)
    for i, ids in enumerate(expected):
        np.testing.assert_array_equal(store.document(i), ids)
    np.testing.assert_array_equal(store.lengths_D, [len(ids) for ids in expected])
    assert store.num_tokens == sum(map(len, expected)) == len(store.ids)
    assert store.unknown == sum((ids == tokenizer.unk_id).sum() for ids in expected)


def stores(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_holds_the_ids_of_every_document(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 500)
    store = build_store(source(), TOKENIZER, tmp_path, lambda documents, tokens: calls.append((documents, tokens)))
    assert_holds(store)
    assert store.ids.dtype == np.uint16 and store.offsets_D1.dtype == np.int64
    assert isinstance(store.ids, np.memmap) and not store.ids.flags.writeable
    assert store.unknown_share == store.unknown / store.num_tokens > 0
    assert (store.source, store.fingerprint, store.tokenizer_sha256) == ("texts", "f", TOKENIZER.sha256)
    assert calls == sorted(calls) and len(calls) > 5 and calls[-1] == (200, store.num_tokens)


def test_the_same_bytes_for_every_thread_count_and_batch_size(tmp_path):
    built = []
    for threads in (None, "1", "3"):
        environment = {"TOKENIZERS_PARALLELISM": "false"} if threads is None else {"RAYON_NUM_THREADS": threads}
        code = f"os.environ.update({environment}); store._BATCH_CHARACTERS = 100 * {threads or 2}\n"
        cache = tmp_path / str(threads)
        assert run_child(code + "store.build_store(t.source(), t.TOKENIZER, cache)", cache).returncode == 0
        (path,) = cache.iterdir()
        built.append({file.name: file.read_bytes() for file in path.iterdir()})
    assert built[0] == built[1] == built[2] and len(built[0]) == 3
    assert_holds(open_store(path))


def test_large_vocabularies_take_four_bytes(tmp_path):
    for extra, dtype in ((65_536 - 5 - len(WORDS), np.uint16), (65_537 - 5 - len(WORDS), np.uint32)):
        tokenizer = wordpiece((*SPECIALS, *(f"x{i}" for i in range(extra)), *WORDS))
        store = build_store(source(), tokenizer, tmp_path)
        assert store.ids.dtype == dtype
        assert_holds(store, tokenizer=tokenizer)
    assert store.ids.max() == 65_536


def test_found_again_by_content(tmp_path):
    first = build_store(source(), TOKENIZER, tmp_path)
    again = build_store(source(kind=Unreadable), wordpiece((*SPECIALS, *WORDS)), tmp_path)
    assert again.path == first.path
    assert_holds(again)
    other_text = build_store(source(["w1"], "g"), TOKENIZER, tmp_path)
    other_tokenizer = build_store(source(), wordpiece((*SPECIALS, *WORDS[::-1])), tmp_path)
    assert len({first.path, other_text.path, other_tokenizer.path}) == 3 == len(stores(tmp_path))


def test_a_file_moved_is_found_and_a_file_changed_is_not(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2 w3"}\n', encoding="utf-8")
    first = build_store(open_source(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "cache")
    (tmp_path / "a.jsonl").rename(tmp_path / "b.jsonl")
    assert build_store(open_source(tmp_path / "b.jsonl"), TOKENIZER, tmp_path / "cache").path == first.path
    (tmp_path / "b.jsonl").write_text('{"text": "w1 w2 w4"}\n', encoding="utf-8")
    changed = build_store(open_source(tmp_path / "b.jsonl"), TOKENIZER, tmp_path / "cache")
    assert changed.ids.tolist() == TOKENIZER.encode_batch(["w1 w2 w4"])[0].tolist()


def damage(path: Path, how: str) -> None:
    meta = path / "meta.json"
    if how == "bit":
        raw = bytearray((path / "ids.bin").read_bytes())
        raw[len(raw) // 2] ^= 1
        (path / "ids.bin").write_bytes(raw)
    elif how == "short":
        os.truncate(path / "ids.bin", 10)
    elif how == "offsets":
        os.truncate(path / "offsets.bin", 8)
    elif how == "missing":
        (path / "offsets.bin").unlink()
    elif how == "no meta":
        meta.unlink()
    elif how == "cut meta":
        os.truncate(meta, 20)
    elif how == "list meta":
        meta.write_text("[]", encoding="utf-8")
    elif how == "bytes meta":
        meta.write_bytes(b"\xff")
    elif how == "format":
        meta.write_text(json.dumps(json.loads(meta.read_text(encoding="utf-8")) | {"format": 99}), encoding="utf-8")


DAMAGE = ["bit", "short", "offsets", "missing", "no meta", "cut meta", "list meta", "bytes meta", "format"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_store_is_refused_and_built_again(tmp_path, how):
    path = build_store(source(), TOKENIZER, tmp_path).path
    damage(path, how)
    with pytest.raises(InputError) as error:
        open_store(path)
    assert str(path) in str(error.value) and "delete the folder" in str(error.value) and "\n" not in str(error.value)
    rebuilt = build_store(source(), TOKENIZER, tmp_path)
    assert rebuilt.path == path and stores(tmp_path) == [path.name]
    assert_holds(rebuilt)


def test_empty_corpora_leave_nothing(tmp_path):
    for texts in ([], ["", "\u200b"]):
        with pytest.raises(InputError, match=f"texts: {len(texts)} documents without a single token; give"):
            build_store(source(texts), TOKENIZER, tmp_path)
        assert stores(tmp_path) == []


def test_an_error_in_the_text_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 10)
    (tmp_path / "a.jsonl").write_text('{"text": "w1 w2 w3"}\n' * 9 + "{", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl:10: not JSON"):
        build_store(open_source(tmp_path / "a.jsonl"), TOKENIZER, tmp_path / "cache")
    assert stores(tmp_path / "cache") == []


def run_child(code: str, cache: Path) -> subprocess.CompletedProcess:
    """Runs `code` in a new process with this file's source and tokenizer; `cache` is the cache folder."""
    preamble = (
        "import os, resource, signal, sys; from pathlib import Path; import test_data_store as t;"
        "from bert6_jax.data import store; store._BATCH_CHARACTERS = 500;"
    )
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])}
    command = [sys.executable, "-c", f"{preamble}cache = Path({str(cache)!r})\n{code}"]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_killed_build_leaves_no_store(tmp_path):
    kill = "store.build_store(t.source(), t.TOKENIZER, cache, lambda d, n: os.kill(os.getpid(), signal.SIGKILL))"
    assert run_child(kill, tmp_path).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".building-")
    with pytest.raises(InputError):
        open_store(left)
    assert_holds(build_store(source(), TOKENIZER, tmp_path))
    assert left.exists()  # it could still belong to a living builder
    for path in (left, *left.iterdir()):
        os.utime(path, (time.time() - 4000,) * 2)
    store = build_store(source(["w1"], "g"), TOKENIZER, tmp_path)
    assert not left.exists() and store.path.is_dir()


def test_a_full_disk_leaves_no_store(tmp_path):
    # A limit on file sizes makes the kernel refuse the write as a full disk does.
    code = (
        "resource.setrlimit(resource.RLIMIT_FSIZE, (700, 700))\n"
        "try: store.build_store(t.source(), t.TOKENIZER, cache)\n"
        "except OSError as error: sys.exit(100 + error.errno)"
    )
    child = run_child(code, tmp_path)
    assert child.returncode == 100 + errno.EFBIG, child.stderr
    assert stores(tmp_path) == []


def test_no_space_for_the_cache_is_an_os_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(OSError, match="No space left"):
        build_store(source(), TOKENIZER, tmp_path)


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for cache in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(InputError, match=f"{cache}: cannot keep tokens here .*set BERT6_JAX_CACHE"):
            build_store(source(), TOKENIZER, cache)


def test_concurrent_builders(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_BATCH_CHARACTERS", 200)
    with ThreadPoolExecutor(8) as pool:
        built = list(pool.map(lambda _: build_store(source(), TOKENIZER, tmp_path), range(8)))
    assert {store.path for store in built} == {built[0].path} and stores(tmp_path) == [built[0].path.name]
    for store in built:
        assert_holds(store)


def test_another_builder_wins_while_this_one_builds(tmp_path):
    won = []

    class Slow(TextSource):
        def documents(self):
            won.append(build_store(source(), TOKENIZER, tmp_path))
            yield from super().documents()

    store = build_store(source(kind=Slow), TOKENIZER, tmp_path)
    inode = (won[0].path / "ids.bin").stat().st_ino
    assert (store.path / "ids.bin").stat().st_ino == inode and stores(tmp_path) == [store.path.name]
    assert_holds(store)


def test_default_cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("BERT6_JAX_CACHE", str(tmp_path / "c"))
    assert build_store(source(), TOKENIZER).path.parent == tmp_path / "c"
    monkeypatch.setenv("BERT6_JAX_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "bert6-jax"

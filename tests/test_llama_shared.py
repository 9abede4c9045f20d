"""One model, several contexts, threads and processes: who waits for whom, and what is left when they go."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from runtime import BusyError, Llama
from runtime.fair_lock import FairLock
from runtime.model import Cancelled
from tests import serving

PATIENCE = serving.PATIENCE


def answer(llm: Any, prompt: str, **options: Any) -> str:
    result: Any = llm.create_completion(prompt, **{"max_tokens": 12, "seed": 1, "temperature": 1.0, **options})
    return str(result["choices"][0]["text"])


def forever(llm: Any) -> Any:
    """A stream that does not end by itself, after its first chunk."""
    never_end = dict.fromkeys(llm.tokenizer.eos_ids, -1e6)
    stream = llm.create_completion("x", max_tokens=-1, stream=True, logit_bias=never_end)
    next(stream)
    return stream


# ==== Contexts over one model ====


def test_contexts_on_threads_answer_as_alone(llm: Llama) -> None:
    prompts = [f"Thread {i} says {'something ' * i}" for i in range(4)]
    alone = [answer(llm, prompt) for prompt in prompts]
    contexts = [llm.session() for _ in prompts]
    assert all(context.model is llm.model for context in contexts)
    with ThreadPoolExecutor(len(prompts)) as pool:
        for _ in range(3):
            assert list(pool.map(answer, contexts, prompts)) == alone
    assert contexts[1].overlap(contexts[1].tokenize(prompts[1])) > 10 > contexts[0].overlap([])
    for context in contexts:
        context.close()


def test_a_stream_in_one_context_does_not_hold_up_another(llm: Llama) -> None:
    stream, other = forever(llm), llm.session()
    assert answer(other, "abc")
    stream.close()
    other.close()


def test_the_model_goes_with_its_last_context(llm: Llama) -> None:
    other = llm.session()
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        answer(llm, "x")
    assert answer(other, "x") and other.model.layers
    other.close()
    assert other.model.layers == []
    with pytest.raises(ValueError, match="closed"):
        llm.session()


def test_a_model_that_is_dropped_takes_its_threads_along(tiny_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.byte_tokenizer import ByteTokenizer

    monkeypatch.setattr("runtime.engine.load_tokenizer", lambda file: ByteTokenizer())
    before = set(threading.enumerate())
    for end in ("del", "close", "error"):
        found = Llama(tiny_path, backend="numba", n_threads=3, n_ctx=64)
        assert answer(found.session(), "x")
        if end == "close":
            found.close()
        del found
        gc.collect()
        serving.wait_until(lambda: set(threading.enumerate()) <= before, "threads are left")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux tells")
def test_closing_gives_memory_back_and_an_empty_ring_takes_none(open_llama: Any) -> None:
    def anonymous() -> int:
        found = re.search(r"Anonymous: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
        assert found
        return int(found[1]) * 1024

    size = open_llama(n_ctx=200_000).cache_nbytes
    assert size > 50e6
    for written in (True, False):
        before = anonymous()
        llm = open_llama(n_ctx=200_000)
        for memory in (plane.memory for plane in llm._session.cache.planes if written):
            memory[:] = 1
        memory = None
        assert (anonymous() - before > size / 2) == written
        llm.close()
        assert abs(anonymous() - before) < size / 10


# ==== Streams ====


def test_a_stream_may_be_read_in_another_thread(llm: Llama) -> None:
    expected = answer(llm, "ab", max_tokens=30)
    stream: Any = llm.create_completion("ab", max_tokens=30, seed=1, temperature=1.0, stream=True)
    chunks = [next(stream)]
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    assert answer(llm, "cd")  # waits for the reader; it is not this thread's stream any more
    reader.join(PATIENCE)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected


def test_a_thread_cannot_wait_for_the_stream_that_it_reads(llm: Llama) -> None:
    stream = forever(llm)
    outcome: list[object] = []

    def read_and_ask() -> None:
        next(stream)
        try:
            answer(llm, "cd")
        except BusyError as error:
            outcome.append(error)
        stream.close()

    reader = threading.Thread(target=read_and_ask)
    reader.start()
    reader.join(PATIENCE)
    assert len(outcome) == 1 and answer(llm, "cd")


def test_closing_a_stream_that_another_thread_reads(llm: Llama) -> None:
    stream = forever(llm)
    chunks: list[Any] = []
    reader = threading.Thread(target=lambda: chunks.extend(stream))
    reader.start()
    serving.wait_until(lambda: len(chunks) > 3, "nothing came")
    stream.close()
    reader.join(PATIENCE)
    assert not reader.is_alive() and answer(llm, "cd")


def test_leaving_a_stream_frees_the_context(llm: Llama) -> None:
    with llm.create_completion("ab", stream=True) as stream:  # type: ignore[union-attr]
        next(stream)
    assert list(stream) == []
    stream = forever(llm)
    del stream  # nobody can read it any more
    gc.collect()
    assert answer(llm, "cd")


def test_leaving_with_does_not_hide_an_error(open_llama: Any) -> None:
    with pytest.raises(KeyError, match="mine"), open_llama() as llm:
        stream = forever(llm)
        raise KeyError("mine")
    stream.close()
    llm.close()


# ==== Cancelling ====


def test_cancelling_between_layers_leaves_ring_and_ids_in_step(open_llama: Any) -> None:
    """Also where the chunk that was cut off had begun to write over what a full ring still held."""
    llm, fresh = open_llama(n_ctx=32, n_batch=8), open_llama(n_ctx=32, n_batch=8)
    prompt = [i % 200 for i in range(70)]

    class AfterSome:
        def __init__(self, looks: int) -> None:
            self.looks = looks

        def is_set(self) -> bool:
            self.looks -= 1
            return self.looks < 0

    expected = fresh.model.forward(prompt, cache := fresh.model.new_cache(32, n_batch=8))
    for looks in range(12, 18):
        ring = llm.model.new_cache(32, n_batch=8)
        with pytest.raises(Cancelled):
            llm.model.forward(prompt, ring, cancel=AfterSome(looks))
        assert ring.length == looks // 3 * 8  # one look before each chunk, one in each of two layers
        assert (llm.model.forward(prompt[ring.length :], ring) == expected).all()
    assert cache.length == 70


def test_a_cancelled_prompt_is_read_on(llm: Llama, open_llama: Any) -> None:
    small = open_llama(n_batch=8)
    cancel = threading.Event()

    def stop_half_way(done: int, total: int) -> None:
        if done >= 24:
            cancel.set()

    result: Any = small.create_completion("abcdefgh" * 8, cancel=cancel, progress=stop_half_way)
    assert result["choices"][0]["finish_reason"] == "cancelled"
    again: Any = small.create_completion("abcdefgh" * 8, max_tokens=12, seed=1, temperature=1.0)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 24
    assert again["choices"][0]["text"] == answer(llm, "abcdefgh" * 8)


# ==== Processes ====


def complete(llm: Llama) -> str:
    """Ask for ids, as the tokenizer of the tiny model is not there; a prompt that is read again rounds as at first."""
    llm.reset()
    result: Any = llm.create_completion([1, 2, 3], max_tokens=8, temperature=0, logprobs=0)
    return str(result["choices"][0]["logprobs"]["token_logprobs"])


def test_pickled_by_its_path(tiny_path: Path) -> None:
    with Llama(os.path.relpath(tiny_path), backend="numpy", n_ctx=64, seed=5, kv="q8") as llm:
        llm.create_completion([7, 8, 9], max_tokens=3)
        with pickle.loads(pickle.dumps(llm)) as copy:
            assert (copy.n_ctx, copy.seed, copy.path) == (64, 5, tiny_path.resolve())
            assert copy.cache_nbytes == llm.cache_nbytes and copy.model is not llm.model
            assert complete(copy) == complete(llm)


@pytest.mark.parametrize("method", sorted({"fork", "spawn"} & set(multiprocessing.get_all_start_methods())))
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_other_processes(tiny_path: Path, method: str) -> None:
    context: Any = multiprocessing.get_context(method)
    with Llama(tiny_path, backend="numpy", n_ctx=64) as llm, llm.session() as other:
        expected = complete(llm)
        stop = threading.Event()
        busy = threading.Thread(target=lambda: [complete(other) for _ in iter(stop.is_set, True)])
        busy.start()
        try:
            with context.Pool(1) as pool:
                assert pool.apply_async(complete, (llm,)).get(PATIENCE) == expected
            if method == "fork":
                child = context.Process(target=lambda: os._exit(17 * (complete(llm) == complete(other) == expected)))
                child.start()
                child.join(PATIENCE)
                assert child.exitcode == 17
        finally:
            stop.set()
            busy.join()


# ==== The lock ====


def test_threads_get_the_lock_in_the_order_of_asking() -> None:
    lock, order = FairLock(), list[int]()

    def take(i: int) -> None:
        with lock:
            order.append(i)

    threads = [threading.Thread(target=take, args=(i,)) for i in range(8)]
    with lock:
        for i, thread in enumerate(threads):
            thread.start()
            serving.wait_until(lambda n=i: len(lock._waiting) == n + 1, "the thread does not wait")  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert order == list(range(8))


def test_the_lock_is_free_after_an_error() -> None:
    lock = FairLock()
    for _ in range(2):
        with pytest.raises(KeyError), lock:
            raise KeyError

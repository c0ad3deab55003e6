"""What waits becomes batches: sizes, waiting, refusals, cancelled work, and the end."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from convnext_deploy.serving.batching import PLANNED, Closed, Job, Queue, Refused, batch_sizes

Made = Callable[..., "Bench"]


class Bench:
    """A queue over a session that waits until it is told to go on, and gives each image's first value."""

    def __init__(self, threads: int = 1, held: bool = False, **options: object) -> None:
        self.go = threading.Event()
        if not held:
            self.go.set()
        self.ran: list[int] = []
        self.over: list[Job] = []
        self.told = threading.Condition()
        self.queue = Queue(self.run, self.deliver, **{"largest": 4, "threads": threads} | options)  # type: ignore[arg-type]

    def run(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        self.ran.append(len(images))
        self.go.wait(10)
        if (images == 13).any():
            raise RuntimeError("unlucky")
        return (images.reshape(len(images), -1)[:, :1].astype(np.float32),)

    def deliver(self, jobs: Sequence[Job]) -> None:
        with self.told:
            self.over += jobs
            self.told.notify_all()

    def ask(self, *values: int, side: int = 2) -> Job:
        job = self.queue.admit(len(values))
        self.queue.put(job, np.stack([np.full((1, side, side), value, np.float32) for value in values]))
        return job

    def wait(self, count: int) -> None:
        with self.told:
            assert self.told.wait_for(lambda: len(self.over) >= count, 10)

    def occupied(self) -> None:
        """A first batch runs, so that what follows waits."""
        self.ask(0)
        until = time.monotonic() + 10
        while not self.ran and time.monotonic() < until:
            time.sleep(0.001)


@pytest.fixture
def bench() -> Iterator[Made]:
    made: list[Bench] = []

    def make(**options: object) -> Bench:
        made.append(Bench(**options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.go.set()
        one.queue.close()
        assert one.queue.join(10)


@pytest.mark.parametrize("largest", [1, 2, 5, 8, 32, 100, 128, 256])
def test_batches_have_few_sizes_up_to_the_largest(largest: int) -> None:
    sizes = batch_sizes(largest)
    assert sizes[-1] == largest
    assert sizes[0] == 1
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= PLANNED


def test_each_request_gets_its_own_outputs(bench: Made) -> None:
    one = bench(threads=3)
    jobs = [one.ask(*range(start, start + count)) for start, count in ((20, 1), (30, 3), (40, 2), (50, 4), (60, 1))]
    one.wait(5)
    for job in jobs:
        assert job.outputs is not None
        assert job.images is not None
        assert job.outputs[0][:, 0].tolist() == job.images[:, 0, 0, 0].tolist()


def test_what_waits_while_a_batch_runs_becomes_the_next_batches(bench: Made) -> None:
    one = bench(held=True, largest=4)
    one.occupied()
    for value in range(1, 8):
        one.ask(value)
    assert one.queue.waiting == 7
    one.go.set()
    one.wait(8)
    assert one.ran == [1, 4, 3]


def test_a_size_between_two_is_not_filled_up_but_taken_in_two(bench: Made) -> None:
    one = bench(held=True, largest=32)  # 1, 2, 3, 6, 8, 16 ...
    one.occupied()
    for value in range(1, 6):
        one.ask(value)
    one.go.set()
    one.wait(6)
    assert sum(one.ran) == 6
    assert set(one.ran) <= set(one.queue.sizes)


def test_images_of_another_shape_do_not_share_a_batch(bench: Made) -> None:
    one = bench(held=True)
    one.occupied()
    for side in (2, 2, 3, 2):
        one.ask(7, side=side)
    one.go.set()
    one.wait(5)
    assert one.ran == [1, 2, 1, 1]


def test_a_batch_waits_for_others_only_as_long_as_it_is_told(bench: Made) -> None:
    one = bench(wait_s=0.3)
    started = time.monotonic()
    one.ask(1)
    one.ask(2)
    one.wait(2)
    assert one.ran == [2]
    assert 0.25 < time.monotonic() - started < 2
    started = time.monotonic()
    for value in range(4):  # a full one does not wait
        one.ask(value)
    one.wait(6)
    assert time.monotonic() - started < 0.25


def test_cancelled_work_leaves_the_queue_and_is_not_computed(bench: Made) -> None:
    one = bench(held=True)
    one.occupied()
    jobs = [one.ask(value) for value in range(1, 5)]
    for job in jobs[:3]:
        one.queue.cancel(job)
    assert one.queue.waiting == 1
    assert one.queue.admitted == 2  # the one that runs, and the one that waits
    one.go.set()
    one.wait(2)
    assert one.ran == [1, 1]
    assert one.queue.admitted == 0


def test_an_error_is_told_to_the_requests_of_its_batch_and_ends_no_thread(bench: Made) -> None:
    one = bench()
    bad = one.ask(13)
    one.wait(1)
    assert str(bad.error) == "unlucky"
    good = one.ask(5)
    one.wait(2)
    assert good.error is None
    assert good.outputs is not None


def test_more_than_there_is_room_for_is_refused_until_something_is_answered(bench: Made) -> None:
    one = bench(held=True, room=3)
    one.occupied()
    one.ask(1)
    one.ask(2)
    with pytest.raises(Refused, match="3 images are waiting; at most 3 do"):
        one.queue.admit(1)
    one.go.set()
    one.wait(3)
    one.ask(3)
    one.wait(4)


def test_what_would_take_longer_than_the_limit_is_refused_with_the_time_to_wait(bench: Made) -> None:
    one = bench(limit_s=0.5)
    slow = one.run

    def run(images: np.ndarray) -> tuple[np.ndarray, ...]:
        time.sleep(0.2)
        return slow(images)

    one.queue._run = run
    one.ask(0)
    one.wait(1)  # 0.2 s an image, from now on
    taken = [one.ask(1), one.ask(2)]
    with pytest.raises(
        Refused, match=r"2 images are waiting, so the answer would take 6\d\d ms; the limit is 500 ms"
    ) as error:
        one.queue.admit(1)
    assert error.value.retry_s == pytest.approx(0.1, abs=0.08)
    one.wait(1 + len(taken))


def test_closing_answers_what_was_taken_and_refuses_what_comes(bench: Made) -> None:
    one = bench(held=True)
    one.occupied()
    undecoded = one.queue.admit(1)
    waiting = one.ask(4)
    one.queue.close()
    with pytest.raises(Closed):
        one.queue.admit(1)
    one.queue.put(undecoded, np.full((1, 1, 2, 2), 9, np.float32))
    one.go.set()
    assert one.queue.join(10)
    assert {id(job) for job in one.over} >= {id(waiting), id(undecoded)}
    assert all(job.error is None for job in one.over)


def test_closing_ends_when_the_last_job_is_cancelled_before_its_images_come(bench: Made) -> None:
    one = bench()
    job = one.queue.admit(2)
    one.queue.close()
    assert not one.queue.join(0.05)
    one.queue.cancel(job)
    assert one.queue.join(10)


def test_many_threads_lose_and_mix_up_nothing(bench: Made) -> None:
    one = bench(threads=4, largest=8)

    def client(number: int) -> None:
        for step in range(50):
            job = one.ask(*(20 + number * 1000 + step,) * (1 + step % 3))
            if step % 7 == 0:
                one.queue.cancel(job)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    one.queue.close()
    assert one.queue.join(10)
    assert one.queue.admitted == one.queue.waiting == 0
    assert len(one.over) >= 8 * 50 - 8 * 8
    for job in one.over:
        assert job.outputs is not None
        assert job.images is not None
        assert job.outputs[0][:, 0].tolist() == job.images[:, 0, 0, 0].tolist()


def test_a_thread_that_has_work_but_has_not_begun_is_not_free(bench: Made) -> None:
    one = bench()
    with one.queue._changed:  # no thread of the queue wakes up meanwhile
        one.ask(1)
        assert not one.queue.has_free_thread
    one.wait(1)


def test_work_in_the_callers_own_thread_runs_beside_the_queues_threads(bench: Made) -> None:
    one = bench(held=True)
    free = [one.queue.has_free_thread]
    one.occupied()
    free.append(one.queue.has_free_thread)
    assert free == [True, False]
    one.go.set()
    job = one.queue.admit(2)
    images = np.full((2, 1, 2, 2), 7, np.float32)
    (values,) = one.queue.run(job, images, prepared_s=0.1)
    assert values[:, 0].tolist() == [7, 7]
    one.wait(2)
    assert one.queue.admitted == 0
    with pytest.raises(RuntimeError, match="unlucky"):
        one.queue.run(one.queue.admit(1), np.full((1, 1, 2, 2), 13, np.float32))
    until = time.monotonic() + 10
    while not one.queue.has_free_thread and time.monotonic() < until:
        time.sleep(0.001)
    assert one.queue.has_free_thread


def test_what_has_waited_for_longer_than_the_limit_is_refused(bench: Made) -> None:
    one = bench(limit_s=0.5)
    one.queue.cancel(one.queue.admit(1, waited_s=0.4))
    with pytest.raises(Refused, match="other requests were waiting, so the answer would take 600 ms; the limit is 500"):
        one.queue.admit(1, waited_s=0.6)

import time
from threading import Thread

from smes.model.turns import Turns


def test_who_waits_comes_before_who_wants_it_again() -> None:
    turns, order = Turns(), list[str]()

    def wait() -> None:
        with turns.turn():
            order.append("waiting")

    for _ in range(50):
        order.clear()
        thread = Thread(target=wait)
        with turns.turn():
            thread.start()
            deadline = time.monotonic() + 10
            while not turns.waiting:
                assert time.monotonic() < deadline
        with turns.turn():
            order.append("again")
        thread.join()
        assert order == ["waiting", "again"]

"""Work on other threads, beside what is measured or tested."""

import threading
from contextlib import contextmanager


@contextmanager
def beside(*jobs):
    """Each job over and over on a thread of its own until the block ends; what one raises comes out there. Gives the
    list of what was raised so far, for who waits for a job."""
    stop, failures = threading.Event(), []

    def repeat(job):
        try:
            while not stop.is_set():
                job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]

"""How much the fuzz tests try, and within which bounds.

CI tries a few examples, the same ones each time. `make fuzz` sets AHN_FUZZ_SEED, which it prints, and AHN_FUZZ_EFFORT,
a factor on every number of examples.
"""

import os
import random
import signal
from contextlib import contextmanager

from hypothesis import HealthCheck, Phase, seed, settings

from ahn.errors import AHNError

SEED = int(os.environ.get("AHN_FUZZ_SEED", "0"))
EFFORT = float(os.environ.get("AHN_FUZZ_EFFORT", "1"))
SECONDS = 60  # of one example: far more than any takes, so that only one that hangs is found
MEMORY = 4 << 30  # bytes that one example may add to the process


def times(count):
    return max(1, round(count * EFFORT))


def draw_for(*names):
    """A generator of its own for each case, so that one can be run alone."""
    return random.Random(f"{SEED} {names}")


def fuzz(count):
    """Runs a test with `count` examples, drawn from the seed."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    chosen = settings(
        max_examples=times(count),
        phases=[Phase.explicit, Phase.generate, Phase.shrink],
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=checks,
    )
    return lambda test: seed(SEED)(chosen(test))


@contextmanager
def bounded(folder, refusals=AHNError):
    """Within, nothing but `refusals` is raised, each of one line; time and memory are bounded, and nothing in `folder`
    changes. Yields a list, which holds the refusal afterwards if there was one."""
    before, refused = _files(folder), []
    with _limits():
        try:
            yield refused
        except refusals as error:
            refused.append(error)
    for error in refused:
        assert len(str(error).splitlines()) == 1, repr(str(error))
    assert _files(folder) == before


def _files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def _limits():
    import resource

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (_in_use() + MEMORY, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _in_use():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")

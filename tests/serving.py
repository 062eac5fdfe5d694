"""A server of a tiny random model on a free port, in a thread."""

import socket
import threading
import time
from contextlib import contextmanager

import pytest

from ahn.engine.batch import Engine
from conftest import tiny, with_memory
from tiny_tokenizer import tiny_tokenizer

NEEDED = "fastapi", "uvicorn", "python_multipart", "prometheus_client", "httpx", "openai"
NAME = "tiny"

for module in NEEDED:  # whoever imports this is skipped without them
    pytest.importorskip(module, reason=f"needs {module}: pip install 'ahn[serve]' httpx openai")


def tiny_model(window=192, **changes):
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return with_memory(tiny(vocab_size=len(tokenizer), **ids), window=window, **changes), tokenizer


@contextmanager
def server(folder, model=None, keys=None, recall=None, slots=4, **limits):
    """Yields the address and the state."""
    import uvicorn

    from ahn.serve.app import build
    from ahn.serve.settings import Limits
    from ahn.serve.state import State

    model, tokenizer = model or tiny_model()
    engine = Engine(model, tokenizer, slots=slots)
    owners = keys.names if keys else []
    state = State(engine, NAME, folder, owners=owners, limits=Limits(**limits), recall=recall)
    listening = socket.create_server(("127.0.0.1", 0))
    serving = uvicorn.Server(uvicorn.Config(build(state, keys), log_level="error", timeout_graceful_shutdown=5))
    with engine, listening:
        thread = threading.Thread(target=serving.run, kwargs={"sockets": [listening]})
        thread.start()
        address = "http://{}:{}".format(*listening.getsockname())
        try:
            while not serving.started:
                assert thread.is_alive(), "the server has ended"
                time.sleep(0.01)
            yield address, state
        finally:
            serving.should_exit = True
            thread.join()

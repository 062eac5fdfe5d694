"""Serve a model and its memories to OpenAI clients over HTTP (docs/serve.md).

  ahn serve --folder memories/
  ahn serve --folder memories/ --keys keys.txt --new-key anna     make a key, print it, and end

It listens on this machine only, unless --host says otherwise, which needs --keys. Ctrl-C ends it.
"""

from __future__ import annotations

import argparse
import os
import socket
from pathlib import Path

from ahn.cli import _options
from ahn.errors import ConfigError

LOCAL = "localhost", "127.0.0.1", "::1"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", metavar="DIR", help="where memories are kept; it is made if it is missing")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=_options.at_least(0), default=8080, metavar="P", help="(default: %(default)s)")
    parser.add_argument("--keys", metavar="FILE", help="API keys, each with memories of its own")
    parser.add_argument("--new-key", metavar="NAME", help="add a key to --keys, print it, and end")
    parser.add_argument(
        "--slots", type=_options.at_least(1), default=8, metavar="N", help="answers at once (default: %(default)s)"
    )
    parser.add_argument(
        "--recall",
        type=_options.at_least(0),
        metavar="N",
        help="tokens of passages to read again where a request does not say (default: 512 if the memory has keys)",
    )
    _options.add_model(parser)


def run(args: argparse.Namespace) -> None:
    try:
        import fastapi  # noqa: F401 - asked for here, so that its absence is told in one line
        import python_multipart  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ConfigError(f"needs {error.name}: pip install 'ahn[serve]'") from error
    from ahn.serve.keys import Keys, add_key

    if args.new_key:
        if not args.keys:
            raise ConfigError(f"--new-key {args.new_key}: goes with --keys FILE")
        print(add_key(args.keys, args.new_key))
        return
    if not args.folder:
        raise ConfigError("--folder: required")
    if args.exact is not None:
        raise ConfigError("--exact: all memories of a server have one size; expected --window or --lossless")
    if args.host not in LOCAL and not args.keys:
        raise ConfigError(f"--host {args.host}: others can reach it; expected --keys FILE as well")
    keys = Keys(args.keys) if args.keys else None
    try:
        listening = socket.create_server(
            (args.host, args.port), family=socket.AF_INET6 if ":" in args.host else socket.AF_INET
        )
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--host {args.host} --port {args.port}: {getattr(error, 'strerror', error)}; expected a free one"
        ) from error
    from ahn.adapter import from_pretrained
    from ahn.bases import load_tokenizer
    from ahn.cli._checks import check_before_loading
    from ahn.cli._console import console, show_log, size
    from ahn.engine.batch import Engine
    from ahn.files import claimed
    from ahn.serve.app import build
    from ahn.serve.settings import Limits
    from ahn.serve.state import State

    show_log()
    base = args.base or "smollm2-135m"
    adapter = check_before_loading(args, {}, base, args.adapter)
    journal = Path(args.folder) / "journal.jsonl"
    with listening, claimed(journal, "--folder"), console.status(f"loading {base}"):
        model = from_pretrained(
            base,
            adapter,
            window=args.window,
            sinks=args.sinks,
            cell=args.cell,
            store=args.store,
            store_size=args.store_size,
            store_span=args.store_span,
            lossless=args.lossless,
            dtype=args.dtype,
            device=args.device,
        )
        engine = Engine(model, load_tokenizer(base), slots=args.slots, chunk=args.chunk)
        name = Path(base).stem if os.path.exists(base) else base
        state = State(
            engine,
            name,
            Path(args.folder),
            owners=keys.names if keys else [],
            limits=Limits(),
            recall=args.recall,
        )
        config = uvicorn.Config(build(state, keys), log_level="warning", timeout_graceful_shutdown=5)
        with engine:
            held = size(engine.bytes_needed(args.slots))
            console.print(f"model   {name}; {args.slots} answers at once; weights, slots and a chunk {held}")
            console.print(f"serving http://{args.host}:{listening.getsockname()[1]}/v1 (Ctrl-C ends it)")
            uvicorn.Server(config).run(sockets=[listening])

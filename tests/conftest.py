"""Tiny random models: everything here runs on a CPU, offline, in seconds."""

import json
import signal
from pathlib import Path

import pytest
import torch

import ahn
from ahn import cli, stores
from ahn.cells.modules import unit
from ahn.compat import PAST
from ahn.memory.handle import layers_of
from ahn.memory.head_keys import RetrievalHeads
from ahn.ops.specs import Window

# In the background of a script, or behind nohup, these are ignored; some tests send them.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name) and signal.getsignal(getattr(signal, name)) == signal.SIG_IGN:
        signal.signal(getattr(signal, name), handler)
torch.set_num_threads(1)  # tiny products gain nothing from more, and parallel test processes lose

VOCABULARY = 128
GOLDEN = Path(__file__).parent / "golden"
FORMS = {  # of the memory, beside the paper's
    "no positions": {"memory_positions": "none"},
    "maps": {"memory_positions": "none", "feature_maps": 1, "window_gate": True},
    "wide": {"feature_maps": 4, "window_gate": True},
}
STORES = stores.names()
HEADS = ((0, 1), (1, 0), (1, 3))  # layer and head of those that retrieve
CELLS = {"gated_deltanet": "GatedDeltaNet", "deltanet": "DeltaNet", "mamba2": "Mamba2"}

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny(family="Llama", seed=0, **changes):
    """A random causal language model of a transformers family, in float32 and eval mode."""
    import transformers

    torch.manual_seed(seed)
    settings = SHAPE | changes
    if family in ("Mistral", "Qwen2", "Qwen3"):
        settings.setdefault("sliding_window", None)
    config = getattr(transformers, f"{family}Config")(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():  # larger than transformers starts with, so that errors show
        if parameter.dim() > 1:
            parameter.data.mul_(4)
        elif "bias" in name:
            parameter.data.normal_(std=0.1)
    return model


def with_memory(model, cell="gated_deltanet", window=16, sinks=4, seed=1, **changes):
    """Augment with a cell whose every weight matters (a new one's projection is zero)."""
    ahn.augment(model, ahn.AHNConfig(cell=cell, window=window, sinks=sinks, **changes))
    torch.manual_seed(seed)
    for layer in layers_of(model):
        if layer.cell is not None:
            for name, parameter in layer.cell.named_parameters():
                if name.endswith("o_proj.weight") or "_map." in name:
                    parameter.data.normal_(std=0.5)
                elif name.startswith("room."):
                    parameter.data.normal_(std=0.3)
                elif parameter.dim() > 1:
                    parameter.data.normal_(std=0.2)
    return model


def storing(store, cell="gated_deltanet", base=None, **changes):
    changes = {"window": 16, "sinks": 4, "store_size": 8} | changes
    model = with_memory(base or tiny(), cell, store=store, **changes)
    for layer in layers_of(model):
        for parameter in () if layer.store is None else layer.store.parameters():
            generator = torch.Generator().manual_seed(layer.store.layer)
            parameter.data = torch.empty(parameter.shape).normal_(std=0.5, generator=generator).to(parameter)
    return model


def retrieval(pool=1, size=8):
    """Heads of the tiny model: 4 query heads, 2 key/value heads."""
    scales = {0: torch.ones(2, 1, size), 1: torch.ones(2, 2, size)}
    scales = {layer: torch.stack([torch.zeros_like(s[0]), 0.05 * s[1]]) for layer, s in scales.items()}
    return RetrievalHeads(HEADS, 2, scales, pool, 64)


def token_ids(length, batch=1, seed=3):
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(model, ids, sizes, mask=None):
    """Logits [B, T, V] of reading `ids` through a cache in pieces of these sizes."""
    cache, out, low = ahn.AHNCache(model), [], 0
    with torch.no_grad():
        for size in sizes:
            seen = None if mask is None else mask[:, : low + size]
            out.append(model(ids[:, low : low + size], attention_mask=seen, **{PAST: cache}).logits)
            low += size
    assert low == ids.shape[1]
    return torch.cat(out, 1)


def golden_tensors(cell):
    """Tensors and metadata of the authors' run with one cell."""
    if cell not in CELLS:
        pytest.skip("the authors have no such cell")
    from safetensors import safe_open

    with safe_open(GOLDEN / f"qwen2_{CELLS[cell]}_0.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        return tensors, file.metadata()


def golden_base(tensors, metadata):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    theirs = json.loads(metadata["config"])
    keys = {*SHAPE, "rms_norm_eps", "rope_theta", "tie_word_embeddings"} - {
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    }
    model = Qwen2ForCausalLM(Qwen2Config(**{key: theirs[key] for key in keys})).eval()
    weights = {name: t for name, t in tensors.items() if name.startswith("model.") and ".ahn." not in name}
    assert model.load_state_dict(weights, strict=False).unexpected_keys == []
    return model


def soft_inputs(device="cpu", dtype=torch.float32, size=8, tokens=96):
    """q, k, v, scores, and the score needed for one of 10 slots, of a window of 16 and 4 sinks."""
    from ahn.train import gates

    torch.manual_seed(0)
    q = torch.randn(2, 4, tokens, size).to(device, dtype)
    k, v = torch.randn(2, 2, 2, tokens, size).to(device, dtype)
    scores = torch.randn(2, 2, tokens, device=device)
    return q, k, v, scores, gates.least_kept(scores, 10, Window(size=16, sinks=4), 1e-5)


@pytest.fixture(params=ahn.cells.names())
def cell(request):
    return request.param


@pytest.fixture(params=STORES)
def store(request):
    return request.param


@pytest.fixture
def small_grids(monkeypatch):
    """So that short texts cross several."""
    monkeypatch.setattr(stores.get("surprise"), "grid", 16)
    monkeypatch.setattr(stores.get("attention"), "grid", 24)
    monkeypatch.setattr(stores.get("attention"), "every", 8)


@torch.no_grad()
def drifting(cell, device, dtype, total, chunk, steps=2048):
    """A cell, and its state after a random stream. "chunks": by its fastest form of many tokens; "steps": the last ones
    one by one; "exact": in float64 on the CPU."""
    torch.manual_seed(0)
    heads, size, hidden = 2, 64, 32
    module = ahn.cells.get(cell)(hidden, heads, size, dtype, device)
    state, exact = torch.zeros(1, heads, size, size, device=device), torch.zeros(1, heads, size, size).double()
    for left in range(total // chunk, 0, -1):
        count = chunk if left > 1 else steps
        q, k, v = torch.randn(3, 1, heads, count, size, device=device).to(dtype).unbind()
        gates = module.gates(module.gate_inputs(torch.randn(1, count, hidden, device=device).to(dtype)))
        before = state.clone()
        _, state = module.scan(q, k, v, gates, state)
        keys, values, doubles = (
            (unit(x).double().cpu() for x in (q, k)),
            v.double().cpu(),
            [g.double().cpu() for g in gates],
        )
        _, exact = module.chunk(*keys, values, doubles, exact)
    for t in range(steps):
        at = slice(t, t + 1)
        module.step(unit(q[:, :, at]), unit(k[:, :, at]), v[:, :, at].float(), [g[:, :, at] for g in gates], before)
    return module, {"chunks": state.double().cpu(), "steps": before.double().cpu(), "exact": exact}


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a random model and its tokenizer."""
    from tiny_tokenizer import tiny_tokenizer

    folder = tmp_path_factory.mktemp("base")
    tokenizer = tiny_tokenizer()
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    tiny(vocab_size=len(tokenizer), **ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def run(capsys):
    """Runs a command; returns exit code, standard output, standard error."""
    import transformers

    def call(*argv):
        try:
            code = cli.main(argv)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        out, err = capsys.readouterr()
        assert "\x1b" not in out + err, "control codes, although this is no terminal"
        return code, out, err

    before = transformers.logging.get_verbosity()  # the commands quieten transformers, in a process of their own
    yield call
    transformers.logging.set_verbosity(before)

"""Everything that is measured and trained on GPUs, the most important first, on as many of them as there are.

    python benchmarks/all.py DATA --qwen QWEN.gguf --smollm2 SMOLLM2.gguf --output FOLDER [--qwen15 QWEN15.gguf]
        [--seconds 1500] [--only NAME ...] [--list]

A job is one of the scripts beside this one, or `ahn train`. It begins when the jobs it builds on are done and there is
a GPU for it: what is timed has one for itself, the last of several until all of that is done; others share one by two.
When the time is over what runs is ended; the same command goes on from there: what is done is not done again, and
training, recall and evaluation go on from what they have written. `FOLDER/logs` has what the jobs print, `FOLDER/done`
which are done or have failed, benchmarks/results what they found.

DATA holds `books`, `qa` and `benchmarks`, and what the recipes of the stores name (their first lines say how it is
made): facts-16k, far-16k and books-part for Qwen, facts-long and far-8k for SmolLM2, all .jsonl.xz.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from common import UNFINISHED

HERE = Path(__file__).parent
PATIENCE = 5  # seconds between asking a job to end and ending it
TOGETHER = 2  # jobs on a GPU that are not timed, unless --together says otherwise


@dataclass(frozen=True)
class Job:
    """`command`: words, with {data}, {qwen}, {smollm2} and {output} as given, {name}, {left}, the seconds it has, and
    those of `WORDS`. `after`: jobs that must have succeeded. `seconds`: at most. `timed`: alone on a GPU."""

    name: str
    command: str
    after: tuple[str, ...] = ()
    seconds: float = 600
    timed: bool = False


WORDS = {
    "gates": "{output}/qwen-gates/adapter",
    "small_gates": "{output}/smollm2-gates/adapter",
    "facts": "{data}/facts-16k.jsonl.xz",
    "qwen_data": "data=[{facts},{data}/far-16k.jsonl.xz,{data}/qa/fairytaleqa-train.jsonl.xz,"
    "{data}/books-part.jsonl.xz]",
    "small_books": "{data}/books/train-03.jsonl.xz",
    "small_facts": "{data}/facts-long.jsonl.xz",
    "smollm2_data": "data=[{small_facts},{data}/far-8k.jsonl.xz,{data}/qa/fairytaleqa-train.jsonl.xz,{small_books}]",
    "to_train": "output={output}/{name} report_to=[] --resume",
    "quarter": "window=1488 store_size=496 store_span=4",
    "qwen_recall": "recall.py --base {qwen} --length 16384 --batch 24 --share 0.25 --no-full --no-plain {prompts}",
    "smollm2_recall": "recall.py --base {smollm2} --length 8192 --batch 32 --no-full --no-plain {prompts}",
    "qwen_gap": "gap.py {data}/books/valid.jsonl.xz --base {qwen} --tokens 16384 --lossless 2048 --name gap-{name}",
    "smollm2_gap": "gap.py {data}/books/valid.jsonl.xz --base {smollm2} --lossless 1024 2048 --name gap-{name}",
    "prompts": "--prompts {output}/prompts/{name} --output {output}/recall/{name} --seconds {left} "
    "--name recall-{name}",
    "evaluate": "evaluate.py {data} --prompts {output}/prompts/evaluate --output {output}/evaluate/{name} "
    "--seconds {left} --store learned:4 --share 0.25",
    "curve": "--limit 48 --tasks ruler/niah_single_2 ruler/niah_multikey_1 ruler/niah_multiquery",
    "qwen_gdn": "qwen2.5-coder-0.5b-gated_deltanet",
    "small_dn": "smollm2-135m-deltanet",
    "heads": "{output}/heads",
    "calibrate": "{output}/calibrate",
    "asking": "-m ahn eval --base {qwen15} --lossless 2048 --sinks 64 --batch 24 --output {output}/asked",
    "asked": "{asking} --data {data}/qa",
    "often": "--length 16384 --limit 240 --tasks qa/squad qa/fairytaleqa qa/musique qa/hotpotqa",
    "coder": "{output}/qwen15",
    "many": "-m ahn eval --tasks qa/squad qa/fairytaleqa --data {data}/qa --limit 200 --lossless 2048 --batch 24 "
    "--policies recall ahn rag window full --output {output}/{name}",
}
JOBS = (
    Job("heads", "-m ahn heads --base {qwen15} --data {data}/qa/squad-train.jsonl.xz -o {heads}", (), 200),
    Job("qwen15-cells", "-m ahn train ../recipes/qwen2.5-coder-1.5b-deltanet.yaml base={qwen15} "
        "data=[{data}/facts-long.jsonl.xz,{data}/qa/squad-train.jsonl.xz,{data}/qa/fairytaleqa-train.jsonl.xz,"
        "{data}/books-part.jsonl.xz] {to_train}", (), 900),
    Job("qwen15-gates", "-m ahn train ../recipes/qwen2.5-coder-1.5b-store.yaml base={qwen15} {qwen_data} {to_train}",
        (), 900),
    Job("asked-recall", "{asked} {often} --adapter {heads} --policies recall", ("heads",)),
    Job("asked-plain", "{asked} {often} --adapter none --policies full window"),
    Job("asked-rag", "{asked} {often} --adapter none --policies rag rag-true rag-random"),
    Job("asked-absent", "{asked} --length 16384 --limit 200 --tasks qa/squad-absent qa/fairytaleqa-absent "
        "--adapter {heads} --policies recall rag", ("heads",)),
    Job("calibrate-data", "support.py articles {data}/qa/squad-train.jsonl.xz {calibrate}.jsonl.xz", (), 60),
    Job("asked-calibrate", "{asking} --output {calibrate} --data {calibrate}.jsonl.xz --length 16384 --limit 200 "
        "--tasks qa/squad qa/squad-absent --adapter {heads} --policies recall", ("heads", "calibrate-data")),
    Job("asked-long", "{asked} --length 131072 1048576 --limit 120 --tasks qa/squad --adapter {heads} "
        "--policies recall rag", ("heads",), 900),
    Job("asked-qmsum", "{asked} --length 16384 --limit 100 --tasks qa/qmsum --adapter {heads} --policies recall window "
        "full rag", ("heads",)),
    Job("qwen15", "join.py {output}/qwen15-cells/adapter {coder} --gates {output}/qwen15-gates/adapter --heads {heads}",
        ("qwen15-cells", "qwen15-gates", "heads"), 60),
    Job("coder-recall", "{asked} {often} --adapter {coder} --policies recall", ("qwen15",)),
    Job("coder-ahn", "{asked} {often} --adapter {coder} --policies ahn", ("qwen15",)),
    Job("coder-qmsum", "{asked} --length 16384 --limit 100 --tasks qa/qmsum --adapter {coder} --policies recall ahn",
        ("qwen15",)),
    Job("coder-ruler", "{asking} --length 16384 --limit 20 --tasks ruler/niah ruler/vt ruler/cwe ruler/fwe --adapter "
        "{coder} --policies ahn recall window", ("qwen15",)),
    Job("coder-ruler-qa", "{asked} --length 16384 --limit 40 --tasks ruler/qa --adapter {coder} --policies ahn recall "
        "window", ("qwen15",)),
    Job("qwen15-gap", "gap.py {data}/books/valid.jsonl.xz --base {qwen15} --tokens 16384 --lossless 2048 --name "
        "gap-qwen2.5-coder-1.5b --adapter {coder}@none {coder}@0.25", ("qwen15",), 300),
    Job("coder-absent", "{asked} --length 16384 --limit 200 --tasks qa/squad-absent qa/fairytaleqa-absent "
        "--adapter {coder} --policies recall", ("qwen15",)),
    Job("coder-calibrate", "{asking} --output {calibrate} --data {calibrate}.jsonl.xz --length 16384 --limit 200 "
        "--tasks qa/squad qa/squad-absent --adapter {coder} --policies recall", ("qwen15", "calibrate-data")),
    Job("asked-bm25", "{asked} {often} --adapter {heads} --policies recall --finder bm25", ("heads",)),
    Job("asked-heads", "{asked} {often} --adapter {heads} --policies recall --finder heads", ("heads",)),
    Job("asked-rounds", "{asked} {often} --adapter {heads} --policies recall --rounds 2", ("heads",)),
    Job("asked-zh", "{asking} --data {data}/benchmarks --tasks longbench/multifieldqa_zh --adapter {heads} --policies "
        "full window recall rag", ("heads",)),
    Job("qwen-heads", "-m ahn heads --base {qwen} --adapter {qwen_gdn} --data {data}/qa/squad-train.jsonl.xz -o "
        "{output}/{name}", (), 200),
    Job("smollm2-heads", "-m ahn heads --base {smollm2} --adapter {small_dn} --length 8192 --lossless 1024 --data "
        "{data}/qa/squad-train.jsonl.xz -o {output}/{name}", (), 200),
    Job("qwen-asked", "{many} --length 16384 --base {qwen} --adapter {output}/qwen-heads", ("qwen-heads",)),
    Job("smollm2-asked", "{many} --length 8192 --base {smollm2} --adapter {output}/smollm2-heads",
        ("smollm2-heads",)),
    Job("qwen-gates", "-m ahn train ../recipes/qwen2.5-coder-0.5b-store.yaml base={qwen} {qwen_data} "
        "{to_train}", (), 900),
    Job("smollm2-gates", "-m ahn train ../recipes/smollm2-135m-store.yaml base={smollm2} {smollm2_data} {to_train} "
        "lossless=[2048] {quarter} gate_steps=400 limit=2200000"),
    *(Job(f"qwen-recall-{part}", "{qwen_recall} --adapter {gates} --stores learned:4 --lossless 2048 --limit 200 "
          f"--tasks {tasks}", ("qwen-gates",)) for part, tasks in enumerate((
        "ruler/niah_single_3 infinitebench/passkey={data}/benchmarks/infinitebench-passkey-16384.jsonl.xz",
        "ruler/niah_multikey_1 ruler/niah_single_1",
        "squad/spread={data}/qa ruler/niah_multiquery",
        "ruler/niah_multivalue ruler/niah_single_2",
    ))),
    Job("tests", "-m pytest -q ../tests/test_gpu.py ../tests/ops"),
    Job("qwen-gap", "{qwen_gap} --adapter {gates}@0.125 {gates}@0.25 {gates}@0.5 {qwen_gdn}@none",
        ("qwen-gates",), 300),
    Job("smollm2-gap", "{smollm2_gap} --adapter {small_gates}@0.125 {small_gates}@0.25 {small_gates}@0.5 "
        "{small_dn}@0.25 {small_dn}@none", ("smollm2-gates",), 300),
    Job("smollm2-cells-alone", "-m ahn train ../recipes/smollm2-135m-store-cells.yaml base={smollm2} start={small_dn} "
        "data=[{small_books},{small_facts}] {to_train} store=null store_size=0 store_span=1 window=1984"),
    Job("smollm2-alone-gap", "{smollm2_gap} --adapter {output}/smollm2-cells-alone/adapter",
        ("smollm2-cells-alone",), 200),
    Job("smollm2-quarter", "{smollm2_recall} --adapter {small_gates} --share 0.25 --stores learned:4 --lossless 2048 "
        "--limit 200 --tasks ruler/niah squad/spread={data}/qa", ("smollm2-gates",)),
    Job("qwen-curve", "{qwen_recall} --adapter {gates} --stores learned:4 --lossless 1024 4096 512 8192 {curve}",
        ("qwen-gates",)),
    Job("qwen-rules", "{qwen_recall} --share 0.74 --adapter {qwen_gdn} --stores surprise:4 attention:4 random:4 "
        "recency --lossless 2048 1024 4096 512 8192 {curve}", ("qwen-recall-0", "qwen-recall-1")),
    Job("qwen-evaluate", "{evaluate} --model {qwen}={gates}", ("qwen-gates",), 900),
    Job("smollm2-evaluate", "{evaluate} --model {smollm2}={small_gates}", ("smollm2-gates",), 900),
    Job("qwen-answers", "qa.py {data}/qa/squad-dev.jsonl.xz --base {qwen} --tokens 16384 --lossless 2048 --contexts 10 "
        "--rows 16 --adapter {qwen_gdn}@none {gates}@0.25 --name qa-{name}", ("qwen-gates",), 300),
    Job("smollm2-rules", "{smollm2_recall} --adapter {small_dn} --stores attention:4 surprise:4 --lossless 1024 2048 "
        "256 4096 512 {curve}", ("smollm2-quarter",)),
    Job("where-smollm2-135m", "where.py {data}/books/valid.jsonl.xz --base {smollm2} --name {name}", (), 200),
    Job("train-smollm2-135m-profile", "train.py --recipe ../recipes/smollm2-135m-deltanet.yaml base={smollm2} "
        "--profile --name {name}", (), 200, timed=True),
    Job("gpu", "gpu.py --only qwen2.5-coder-0.5b qwen2.5-3b --seconds {left} --name {name}", (), 400, timed=True),
    *(Job(f"train-qwen2.5-coder-0.5b-{cell}", f"train.py --recipe ../recipes/qwen2.5-coder-0.5b-{cell}.yaml "
          "base={qwen} --steps 15 --name {name}", (), 200, timed=True) for cell in ("deltanet", "gated_deltanet")),
    Job("gpu-real", "gpu.py --base {qwen} --seconds {left} --name {name}", (), 200, timed=True),
    Job("lengths-smollm2-135m-gpu", "lengths.py --base {smollm2} --lengths 4096 8192 16384 32768 65536 131072 --cells "
        "window deltanet full --name {name}", (), 200, timed=True),
    Job("gpu-large", "gpu.py --only qwen2.5-7b qwen2.5-14b --seconds {left} --name {name}", (), 300, timed=True),
)  # fmt: skip


class Runner:
    """Runs jobs on GPUs, for `seconds` at most. `values`: of the words in braces."""

    def __init__(
        self,
        jobs: tuple[Job, ...],
        gpus: int,
        seconds: float,
        output: Path,
        values: dict[str, str],
        together: int = TOGETHER,
    ) -> None:
        self.together = together
        self.jobs, self.gpus, self.values = {job.name: job for job in jobs}, gpus, values
        self.end = time.monotonic() + seconds
        self.done, self.logs = output / "done", output / "logs"
        self.running: dict[str, tuple[subprocess.Popen[bytes], int, float]] = {}
        for folder in (self.done, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self.waiting = [name for name in self.jobs if self.outcome(name) is None]

    def run(self) -> list[str]:
        """Names of the jobs that are not done in the end."""
        while (self.running or any(map(self.able, self.waiting))) and time.monotonic() < self.end:
            for name in list(self.waiting):
                ready = all(self.outcome(other) == "done" for other in self.jobs[name].after)
                if ready and (gpu := self.gpu_for(name)) is not None:
                    self.begin(name, gpu)
            time.sleep(0.1)
            for name in list(self.running):
                self.look_at(name)
        for name in list(self.running):
            self.look_at(name)
        return [name for name in self.jobs if self.outcome(name) != "done"]

    def outcome(self, name: str) -> str | None:
        """That it is "done" or "failed", in this run or an earlier one. Jobs that are not asked for count as done."""
        path = self.done / name
        return path.read_text() if path.is_file() else None if name in self.jobs else "done"

    def able(self, name: str) -> bool:
        """Whether it may begin, now or later: nothing that it builds on has failed or was given up."""
        return all(
            self.outcome(other) == "done" or other in self.running or (other in self.waiting and self.able(other))
            for other in self.jobs[name].after
        )

    def gpu_for(self, name: str) -> int | None:
        """The one with the least to do of those that may take it now."""
        last, timed = self.gpus - 1, self.jobs[name].timed
        on: list[list[str]] = [[] for _ in range(self.gpus)]
        for other, (_, gpu, _) in self.running.items():
            on[gpu].append(other)
        kept = last > 0 and any(self.jobs[other].timed and self.able(other) for other in self.waiting)
        if timed:
            return last if not on[last] else None
        fitting = [
            gpu
            for gpu in range(last if kept else self.gpus)
            if len(on[gpu]) < self.together and not any(self.jobs[other].timed for other in on[gpu])
        ]
        return min(fitting, key=lambda gpu: len(on[gpu]), default=None)

    def begin(self, name: str, gpu: int) -> None:
        self.waiting.remove(name)
        job = self.jobs[name]
        left = int(min(job.seconds, self.end - time.monotonic()))
        words = filled(job.command, self.values | {"name": name, "left": str(max(1, left - 15))}).split()
        script = words if words[0].startswith("-") else [str(HERE / words[0]), *words[1:]]
        with (self.logs / name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *script], stdout=log, stderr=log, cwd=HERE, start_new_session=True,
                env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
            )  # fmt: skip
        self.running[name] = process, gpu, time.monotonic()
        print(f"{name}: begins, at most {left} s", flush=True)

    def look_at(self, name: str) -> None:
        """Note how a job has ended, or end it if its time is over."""
        process, _, since = self.running[name]
        now = time.monotonic()
        over = now > self.end or now - since > self.jobs[name].seconds
        if (code := process.poll()) is None and not over:
            return
        if code is None:
            stop(process)
        elif code != UNFINISHED:
            (self.done / name).write_text("failed" if code else "done")
        said = {None: "time is over", UNFINISHED: "time is over", 0: "done"}.get(
            code, f"failed, see {self.logs / name}"
        )
        print(f"{name}: {said}, {now - since:.0f} s", flush=True)
        del self.running[name]


def filled(command: str, values: dict[str, str]) -> str:
    while "{" in command:
        command = command.format(**WORDS | values)
    return command


def stop(process: subprocess.Popen[bytes]) -> None:
    """With all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(PATIENCE)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--qwen", type=Path, required=True)
    parser.add_argument("--smollm2", type=Path, required=True)
    parser.add_argument("--qwen15", type=Path, default=Path("qwen2.5-coder-1.5b"), help="default: %(default)s")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--gpus", type=int, help="default: all")
    parser.add_argument("--together", type=int, default=TOGETHER, help="jobs on a GPU (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=[job.name for job in JOBS], metavar="NAME")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    paths = {"qwen15": str(options.qwen15.absolute() if options.qwen15.exists() else options.qwen15)}
    paths |= {name: str(getattr(options, name).absolute()) for name in ("data", "qwen", "smollm2", "output")}
    jobs = tuple(job for job in JOBS if not options.only or job.name in options.only)
    if options.list:
        for job in jobs:
            print(job.name + (f", after {', '.join(job.after)}" if job.after else ""))
            print(f"    python {filled(job.command, paths | {'name': job.name, 'left': str(int(job.seconds))})}")
        return
    if options.gpus is None:
        import torch

        options.gpus = torch.cuda.device_count()
    if options.gpus < 1:
        parser.error("no GPU: expected a machine with at least one, or --gpus")
    if left := Runner(jobs, options.gpus, options.seconds, options.output, paths, options.together).run():
        print(f"not done: {', '.join(left)}")


if __name__ == "__main__":
    main()

"""Data-parallel training: two processes with half batches equal one with whole batches."""

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from optical.losses.distillation import OTDistillationLoss

WORKER = """
import os, sys, torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
import test_ddp
rank, folder = int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
loss = torch.nn.parallel.DistributedDataParallel(test_ddp.make_loss())
half = slice(4 * rank, 4 * rank + 4)
part = [{name: value[half] for name, value in one.items()} for one in test_ddp.batch()]
loss(part)["ot_cost"].backward()
torch.save(loss.module.model.vectors.weight.grad, f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()
# Skip the interpreter's shutdown, in which a thread of gloo may abort the process.
os._exit(0)
"""


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.vectors = nn.Embedding(20, 8)

    def forward(self, features, task=None):
        return {**features, "token_embeddings": self.vectors(features["input_ids"])}


def make_loss():
    torch.manual_seed(1)
    return OTDistillationLoss(Model(), Model(), epsilon=0.1)


def batch():
    torch.manual_seed(2)
    return [
        {
            "input_ids": torch.randint(20, (8, tokens)),
            "attention_mask": (torch.arange(tokens) < torch.randint(2, tokens, (8, 1))).long(),
        }
        for tokens in (7, 5)
    ]


def test_two_processes_average_to_the_gradient_of_one(tmp_path):
    whole = make_loss()
    whole(batch())["ot_cost"].backward()
    expected = whole.model.vectors.weight.grad
    command = [sys.executable, "-c", WORKER, os.path.dirname(os.path.abspath(__file__))]
    processes = [subprocess.Popen([*command, str(rank), str(tmp_path)]) for rank in (0, 1)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(*found) and expected.abs().max() > 0
    torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True], ids=["memory", "stream"])
def test_torchrun_trains_like_one_process(world, tiny_models, tmp_path, stream):
    from safetensors.torch import load_file

    def train(name, start, batch_size):
        words = ["--teacher", tiny_models.teacher, "--bitext", str(world / "bitext/en-sw.tsv")]
        words += ["--role", "document", "--output_dir", str(tmp_path / name), "--use_cpu"]
        words += ["--max_steps", "4", "--optim", "sgd", "--learning_rate", "0.5"]
        words += ["--per_device_train_batch_size", str(batch_size), "--save_strategy", "no"]
        words += ["--stream"] if stream else []
        options = {"check": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        subprocess.run([*start, "optical.cli", "train", "distill", *words], **options)
        return load_file(tmp_path / name / "final" / "model.safetensors")

    alone = train("alone", [sys.executable, "-m"], 8)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = train("together", [*run, "-m"], 4)
    start = load_file(f"{tiny_models.teacher}/model.safetensors")
    moved = max(float((alone[name] - start[name]).abs().max()) for name in start)
    apart = max(float((alone[name] - together[name]).abs().max()) for name in start)
    assert moved > 1e-3 and apart < 1e-4 * moved + 1e-6
    made = json.loads((tmp_path / "together" / "run.json").read_text())
    assert made["options"]["stream"] is stream

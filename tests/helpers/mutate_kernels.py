"""How many faults in the kernels their tests notice.

    python -m tests.helpers.mutate_kernels

Breaks one line at a time in a copy of the repository, runs the kernel tests there in Triton's interpreter, and lists
what no test noticed. Some 10 s for each fault.
"""

import os

os.environ |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch._dynamo
import torchvision
import triton

ROOT = Path(__file__).parents[2]
IMPORTED = torch._dynamo, torchvision, triton  # before the forks
LIF, LAUNCHES = "models/kernels/triton_lif.py", "models/kernels/triton_batch_norm.py"
NORM, REDUCE = "models/kernels/batch_norm_kernels.py", "models/kernels/reduction_kernels.py"
OPERATORS, GEGLU, PACKING = "models/kernels/operators.py", "models/kernels/geglu.py", "models/kernels/packing.py"
OPERATOR = "models/kernels/operator.py"
SPLIT, SURROGATES = "dataset/residual_kernel.py", "models/kernels/surrogates.py"
GROUP, MODULE, STEM = "models/kernels/group_norm.py", "models/batch_norm.py", "models/spiking_resnet.py"
TESTS = {
    LIF: "tests/models/kernels/test_lif_kernels.py",
    OPERATORS: "tests/models/kernels/test_lif_kernels.py tests/models/kernels/test_batch_norm_kernels.py",
    OPERATOR: "tests/models/kernels/test_operator.py",
    SURROGATES: "tests/models/kernels/test_lif_kernels.py",
    GEGLU: "tests/models/kernels/test_geglu.py",
    GROUP: "tests/models/kernels/test_group_norm.py",
    PACKING: "tests/models/test_fused_network.py",
    SPLIT: "tests/models/test_fused_network.py",
    STEM: "tests/models/test_fused_network.py",
}
# Run first: these take little time and notice most.
QUICK = "programs or averaged or running or asked or evaluation or half or alike or subclass or packing or split "
QUICK += "or nan or relu_goes or (relu_behind and float64) or (definition and shape)"
# (file, what stands there once or more, what the first of it becomes)
MUTATIONS = [
    # one step
    (LIF, "constant(v, 1.0 / TAU), v)", "constant(v, 1.0 / TAU), v * 0.99)"),
    (LIF, "return tl.where(h >= V_THRESHOLD, 1.0, 0.0)", "return tl.where(h > V_THRESHOLD, 1.0, 0.0)"),
    (LIF, "tl.where(h >= V_THRESHOLD, h - V_THRESHOLD, h)", "h"),
    (LIF, "constant(h, V_RESET)", "constant(h, 0.0)"),
    (LIF, "grad_spike - grad_v * V_THRESHOLD", "grad_spike + grad_v * V_THRESHOLD"),
    (LIF, "grad_v * (V_RESET - h)", "grad_v * (0.0 - h)"),
    (LIF, "through_reset = tl.where(h >= V_THRESHOLD, 0.0, grad_v)", "through_reset = grad_v"),
    (LIF, "surrogate_derivative_triton(h - V_THRESHOLD", "surrogate_derivative_triton(h - 1.0"),
    # the layer alone
    (LIF, "v = tl.load(v0_ptr + neuron, mask, 0.0)", "v = tl.zeros([BLOCK], COMPUTE)"),
    (LIF, "tl.store(v_end_ptr + neuron, v, mask)", "tl.store(v_end_ptr + neuron, h, mask)"),
    (LIF, "grad_v = tl.load(grad_v_end_ptr + neuron, mask, 0.0)", "pass"),
    (LIF, "(grad_h * (1.0 / TAU)).to(grad_x_ptr", "grad_h.to(grad_x_ptr"),
    (LIF, "grad_v = grad_h * (1.0 - 1.0 / TAU)", "grad_v = grad_h"),
    (LIF, "elements_before(t + 1, neurons)", "elements_before(t, neurons)"),
    (LIF, "elements_before(STEPS - 2 - back, neurons)", "elements_before(STEPS - 1 - back, neurons)"),
    (LIF, "mask = neuron < neurons", "mask = neuron < neurons - 1"),
    # surrogates
    (SURROGATES, "(0.5 * ALPHA) * root * root", "(0.5 * ALPHA) * root"),
    (SURROGATES, "scaled = z * (1.5707963267948966 * ALPHA)", "scaled = z * 1.5707963267948966"),
    (SURROGATES, "return ALPHA * decay / ((1.0 + decay)", "return decay / ((1.0 + decay)"),
    (SURROGATES, "tl.maximum(ALPHA - (ALPHA * ALPHA)", "tl.maximum(ALPHA - ALPHA"),
    # statistics
    (REDUCE, "first + tile * ROWS + tl.arange(0, ROWS)[:, None] < rows", "first + tl.arange(0, ROWS)[:, None] < rows"),
    (REDUCE, "tl.sum(square + count * away * away, 0)", "tl.sum(square, 0)"),
    (REDUCE, "share * away * away, 0.0)", "0.0, 0.0)"),
    (REDUCE, "tl.minimum(rows_each, tl.maximum(rows - program * rows_each, 0))", "rows_each + 0 * program"),
    (REDUCE, "square / (rows - 1) - running_var", "square / rows - running_var"),
    (REDUCE, "momentum * (mean - running_mean)", "momentum * mean"),
    (REDUCE, "(1 if OF_EACH_STEP else steps)", "1"),
    (REDUCE, "own = step * channels + column", "own = column"),
    (REDUCE, "for first in range(0, programs, PROGRAMS):", "for first in range(0, PROGRAMS, PROGRAMS):"),
    # forward
    (NORM, "tl.fma(x - mean, inverse * weight, bias)", "tl.fma(x - mean, inverse, bias)"),
    (NORM, "tl.rsqrt(variance + constant(variance, EPS))\n\n", "tl.rsqrt(variance)\n\n"),
    (NORM, "y += added[inner_step].to(COMPUTE)", "y += added[0].to(COMPUTE)"),
    (NORM, "y = rounded.to(COMPUTE)", "pass"),
    (NORM, "later, mask, 0.0),)", "here, mask, 0.0),)"),
    (NORM, "_load_if_any(residual_ptr, later", "_load_if_any(residual_ptr, here"),
    (NORM, "(four * 0.25)", "(four * 0.5)"),
    (REDUCE, "row = (2 * line + part // 2) * width + 2 * place + part % 2", "row = row + 0 * width"),
    (NORM, "is_window = (window < rows // 4)", "is_window = (window < rows // 4 - 1)"),
    # backward
    (NORM, "tl.fma(grad_y, centred, centred_sums[back])", "tl.fma(grad_y, centred, centred_sums[0])"),
    (NORM, "(sums[back] + grad_y,)", "(grad_y,)"),
    (NORM, "sums, centred_sums = new_sums, new_centred", "sums, centred_sums = new_sums, centred_sums"),
    (NORM, "grad_y += grad_sum.to(COMPUTE) * (0.25 if POOL else 1.0)", "grad_y += grad_sum.to(COMPUTE)"),
    (NORM, "grad_y = grad_h * (1.0 / TAU)", "grad_y = grad_h"),
    (NORM, "step - AHEAD, at", "step, at"),
    (NORM, "tl.fma(factor, x.to(COMPUTE) - mean, offset)", "factor * (x.to(COMPUTE) - mean)"),
    (NORM, "tl.fma(factor, x.to(COMPUTE) - mean, offset)", "offset"),
    (NORM, "share * inverse * inverse", "share * inverse"),
    (NORM, "tl.full(like.shape, values, like.dtype)", "tl.full(like.shape, values - 1, like.dtype)"),
    (LAUNCHES, "geometry.rows * geometry.steps // mean.shape[0]", "geometry.rows"),
    (REDUCE, "weight * plain, is_channel", "plain, is_channel"),
    (REDUCE, "weight * centred, is_channel", "centred, is_channel"),
    (REDUCE, "tl.fma(centred, tl.rsqrt(variance + constant(variance, EPS)), grad_weight)", "centred + grad_weight"),
    (REDUCE, "grad_bias += plain", "grad_bias = plain"),
    # ReLU
    (NORM, "y = tl.where(y < 0.0, 0.0, y)", "y = tl.where(y < 0.1, 0.0, y)"),
    (NORM, "y = tl.where(y < 0.0, 0.0, y)", "y = tl.where(y > 0.0, y, 0.0)"),
    (NORM, "result.to(COMPUTE) > 0.0", "result.to(COMPUTE) >= 0.0"),
    (NORM, "result = y.to(x.dtype)", "result = -y.to(x.dtype)"),
    (NORM, "h = charge(y, v, TAU)\n        charged", "h = charge(y, v * 0.5, TAU)\n        charged"),
    (LAUNCHES, "return mean.shape[1] if mean.shape[0] > 1 else 0", "return mean.shape[1]"),
    (LAUNCHES, "return mean.shape[1] if mean.shape[0] > 1 else 0", "return 0"),
    # operators
    (OPERATORS, "or (ctx.relu and residual is not None)", ""),
    (OPERATORS, "total = total if fire or relu else None", "total = total if fire else None"),
    (OPERATORS, "if mean.shape[0] == 1 and weighted.shape[0] > 1:", "if False:"),
    (OPERATORS, "if not ctx.of_batch:", "if False:"),
    (OPERATORS, "if relu and (fire or pool):", "if False:"),
    (OPERATORS, "if not ctx.keep_sum:", "if False:"),
    (OPERATORS, "if not ctx.keep_v:", "if True:"),
    (OPERATORS, "laid_out_as(grad_spikes, current)", "grad_spikes"),
    (OPERATORS, "return None if gradient is None else laid_out_as(gradient, x)", "return gradient"),
    (OPERATORS, "return None if v is None else laid_out_as(v, x[0], membrane_dtype(x.dtype))", "return v"),
    (OPERATORS, "None if residual is None else laid_out_as(residual, x)", "residual"),
    (OPERATORS, "torch.empty_like(x) if fire else", "torch.empty_like(x, dtype=torch.float32) if fire else"),
    (OPERATORS, "return torch.empty_like(current), v\n", "return torch.empty_like(current).float(), v\n"),
    (OPERATOR, "torch.autograd.graph.increment_version(", "list("),
    (OPERATOR, "(twice if torch.is_grad_enabled() else gradient)", "gradient"),
    (OPERATOR, "torch._C._len_torch_dispatch_stack() > 0", "False"),
    (OPERATOR, "torch._C._are_functorch_transforms_active()", "False"),
    # the modules above
    (MODULE, "type(neuron) is LIF and", "neuron is not None and"),
    (MODULE, "x.shape[0] <= MAX_STEPS", "True"),
    (MODULE, "spikes = neuron.counted(spikes) if fires_here", "spikes = spikes if fires_here"),
    (MODULE, "pools_here = pool and residual is None and (fires_here or neuron is None)", "pools_here = pool"),
    (MODULE, "x.flatten(0, 1).unsqueeze(0) if one_for_all else x", "x"),
    (MODULE, "residual = None if residual is None else residual.unsqueeze(0)", "residual = None"),
    (STEM, "neuron=next_neuron, pool=True", "neuron=None, pool=True"),
    # others
    (GEGLU, "gate * (0.5 + 0.5 * tl.erf", "gate * (0.5 + 0.4 * tl.erf"),
    (GEGLU, "(below + gate * density)", "below"),
    (GEGLU, "at + (at // hidden) * hidden", "at"),
    (GEGLU, "tl.store(grad_x_ptr + first + hidden, grad_gate", "tl.store(grad_x_ptr + first + hidden, grad"),
    (PACKING, "tl.sum(ones, 1).to(tl.uint8), byte * 8", "tl.sum(ones, 1).to(tl.uint8), byte * 9"),
    (PACKING, "tl.where(spikes > 0.0, 1, 0) << bit[None, :]", "tl.where(spikes > 0.0, 1, 0)"),
    (PACKING, "(packed[:, None] >> bit[None, :]) & 1", "(packed[:, None] >> bit[None, :])"),
    (SPLIT, "tl.where(colour == 0, MEAN_R", "tl.where(colour == 0, MEAN_G"),
    (SPLIT, "(step * segments + segment)", "(segment * 1 + step)"),
    (SPLIT, "(frame - before) * scale", "frame * scale - before * scale"),
    (SPLIT, "before = frame", "pass"),
    (SPLIT, "at // CHANNELS * 3 + colour", "at"),
    (SPLIT, "is_colour = mask & (colour < 3)", "is_colour = mask"),
    (GROUP, "/ (rows * WIDTH)", "/ rows"),
    (GROUP, "tl.where(mask, x - _group_mean(x,", "tl.where(rows > 0, x - _group_mean(x,"),
    (GROUP, "constant(variance, EPS)", "constant(variance, 0.0)"),
    (GROUP, " * weight[None, :] + bias", " + bias"),
    (GROUP, " - standard * along", ""),
    (GROUP, "grad - _group_mean(grad, rows, COLUMNS, WIDTH) - ", "grad - "),
    (GROUP, "tl.sum(grad * standard, 0)", "tl.sum(grad, 0)"),
    (GROUP, "x, grad = _channels_last(x), _channels_last(grad)", "x = _channels_last(x)"),
]  # fmt: skip


class _FirstFailure:
    """A plugin of pytest's."""

    name = ""

    def pytest_runtest_logreport(self, report):
        self.name = self.name or (report.nodeid if report.failed else "")

    def pytest_collectreport(self, report):
        self.name = self.name or (report.nodeid if report.failed else "")


def noticed(folder: Path, tests: list[str]) -> str:
    """The first test that fails in the copy; "" if none does. In a fork of this process, which has imported all that
    takes long and nothing of the repository."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(folder)
        sys.path[:] = [str(folder), *(path for path in sys.path if path not in ("", str(ROOT)))]
        for name in [name for name in sys.modules if name.partition(".")[0] in ("tests", "models", "dataset", "utils")]:
            del sys.modules[name]
        first = _FirstFailure()
        pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--tb=no", *tests], plugins=[first])
        os.write(writer, first.name.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        name = answer.read()
    os.wait()
    return name


def main() -> None:
    everything = ["tests/models/kernels", "tests/models/test_fused_network.py"]
    everything += ["--deselect", "tests/models/kernels/test_kernel_compilation.py"]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__"))
        for number, (path, before, after) in enumerate(MUTATIONS, start=1):
            source = (copy / path).read_text()
            if before not in source:
                raise SystemExit(f"{path} has no {before!r}: the mutation is out of date")
            (copy / path).write_text(source.replace(before, after, 1))
            near = TESTS.get(path, "tests/models/kernels/test_batch_norm_kernels.py")
            near = near.split()
            test = noticed(copy, [*near, "-k", QUICK]) or noticed(copy, near) or noticed(copy, everything)
            (copy / path).write_text(source)
            if not test:
                survivors.append(f"{path}: {before!r} -> {after!r}")
            print(f"{number:3d} {path}: {before[:60]!r} -> {after[:40]!r}: {test or 'NOT NOTICED'}", flush=True)
    print(f"{len(MUTATIONS) - len(survivors)} of {len(MUTATIONS)} noticed", *survivors, sep="\n    ")


if __name__ == "__main__":
    main()

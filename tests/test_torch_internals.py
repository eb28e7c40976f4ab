"""Private parts of torch that the package uses: all of them, and what is expected of each.

torch may change these in any release. A test that fails here under a new torch names what has to be replaced.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch._inductor
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.tensor import Shard
from torch.nn.modules.conv import _ConvNd
from torch.utils.checkpoint import _StopRecomputationError, checkpoint

from tests.distributed.fleet import Fleet

PACKAGE = Path(__file__).parents[1] / "openm6"
INTERNALS = {
    "torch._dynamo",
    "torch._foreach_copy_",
    "torch._foreach_mul_",
    "torch._softmax_backward_data",
    "torch._inductor.aoti_compile_and_package",
    "torch._inductor.aoti_load_package",
    "torch._int_mm",
    "torch._weight_int8pack_mm",
    "torch.ops.mkldnn._linear_pointwise",
    "torch.cpu._is_amx_tile_supported",
    "torch.cpu._is_avx512_bf16_supported",
    "torch.cpu._is_vnni_supported",
    "torch.nn.modules.conv._ConvNd",
    "torch.utils.checkpoint._StopRecomputationError",
    "torch.distributed.distributed_c10d._set_pg_timeout",
    "torch.distributed.tensor._utils.compute_local_shape_and_global_offset",
    "DeviceMesh._flatten",
}


NAMED_TUPLE = {"_asdict", "_fields", "_replace"}  # public methods of the standard library
BOOSTING = {
    "_predictors",
    "_baseline_prediction",
}  # of scikit-learn; tests/train/test_simple_predictors.py compares them


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE | BOOSTING


def private_names() -> Iterator[str]:
    """Names with an underscore that the package neither defines nor reads from itself."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    own |= {node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in own:
            whole = ast.unparse(node)
            if not whole.startswith("os."):
                yield whole if whole.startswith("torch.") else f"DeviceMesh.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch"):
            yield from (
                f"{node.module}.{name.name}" for name in node.names if private(name.name) or "._" in node.module
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("_is_"):
            yield f"torch.cpu.{node.value}"


def test_all_are_listed_here() -> None:
    assert set(private_names()) == INTERNALS


def test_the_compiler_has_backends_by_name_and_its_errors() -> None:
    assert callable(torch._dynamo.lookup_backend("inductor"))
    assert issubclass(torch._dynamo.exc.TorchDynamoException, Exception)
    assert issubclass(torch._dynamo.exc.FailOnRecompileLimitHit, Exception)


def test_the_compiler_writes_and_reads_packages() -> None:
    """How they run is tested with compiled decoding."""
    assert callable(torch._inductor.aoti_compile_and_package) and callable(torch._inductor.aoti_load_package)


def test_recomputation_ends_by_an_error_once_it_has_all_tensors() -> None:
    """Which is no failure of the block that is recomputed."""
    ends, x = [], torch.ones(2, requires_grad=True)

    def block(x: torch.Tensor) -> torch.Tensor:
        try:
            return x.sin() + 1
        except BaseException as error:
            ends.append(type(error))
            raise

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert ends == [_StopRecomputationError]


def test_lists_of_tensors_change_in_place() -> None:
    first, second = torch.ones(3), torch.zeros(2, 2)
    torch._foreach_mul_([first, second], torch.tensor(2.0))
    torch._foreach_copy_([second], [torch.full((2, 2), 5.0)])
    assert first.tolist() == [2, 2, 2] and (second == 5).all()


def test_the_gradient_of_a_softmax() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    answer, upstream = x.softmax(-1), torch.randn(4, 6)
    (expected,) = torch.autograd.grad(answer, x, upstream)
    found = torch._softmax_backward_data(upstream, answer.detach(), -1, torch.float32)
    torch.testing.assert_close(found, expected)


def test_products_of_weights_in_int8() -> None:
    x, weight = torch.randn(3, 64).bfloat16(), torch.randint(-127, 128, (32, 64), dtype=torch.int8)
    scale = torch.rand(32).bfloat16() / 127
    expected = F.linear(x.float(), weight.float() * scale.float()[:, None])
    found = torch._weight_int8pack_mm(x, weight, scale).float()
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_products_of_integers(rows: int) -> None:
    x, weight = (torch.randint(-127, 128, (size, 64), dtype=torch.int8) for size in (rows, 32))
    assert torch.equal(torch._int_mm(x, weight.t()).double(), F.linear(x.double(), weight.double()))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_products_of_onednn() -> None:
    x, weight, bias = torch.randn(32, 64), torch.randn(16, 64), torch.randn(16)
    found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", "_is_vnni_supported"])
def test_instructions_of_the_processor(name: str) -> None:
    """The package takes a missing function for a missing instruction, so a rename would go unnoticed."""
    assert isinstance(getattr(torch.cpu, name)(), bool)


def test_the_class_of_all_convolutions() -> None:
    assert issubclass(torch.nn.Conv1d, _ConvNd) and issubclass(torch.nn.ConvTranspose2d, _ConvNd)


def mesh_parts() -> tuple[list[str], int, tuple[tuple[int, ...], tuple[int, ...]]]:
    """On a rank: names of a flattened mesh, its size, and shape and offset of this rank's part of a tensor."""
    # Importing them where they are used lets this file be collected without a process group.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # noqa: PLC0415

    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))
    flat = mesh["a", "b"]._flatten("both")
    shape, offset = compute_local_shape_and_global_offset((6, 4), flat, [Shard(0)])
    return list(flat.mesh_dim_names or ()), flat.size(), (tuple(shape), tuple(offset))


def test_meshes_are_flattened_and_parts_located(two: Fleet) -> None:
    found = two.run(mesh_parts)
    assert found == [(["both"], 2, ((3, 4), (0, 0))), (["both"], 2, ((3, 4), (3, 0)))]


def wait_in_vain() -> str:
    """On rank 0: how it ends that it waits for rank 1 in a group whose timeout was set later."""
    group = dist.new_group([0, 1])
    _set_pg_timeout(timedelta(seconds=0.2), group)
    found = ""
    try:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(1), group=group)
    except RuntimeError as error:
        found = str(error)
    dist.barrier()  # rank 1 must not leave before
    return found


def test_the_timeout_of_a_group_is_set_later(two: Fleet) -> None:
    assert "Timed out waiting 200ms" in two.run(wait_in_vain)[0]

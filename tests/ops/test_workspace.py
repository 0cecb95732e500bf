import threading

import pytest
import torch

from moe_overlap.errors import ConfigError
from moe_overlap.ops import workspace
from moe_overlap.ops.workspace import SMALLEST_BYTES, Workspace

CPU = torch.device("cpu")
ROWS = SMALLEST_BYTES // 4


def take(pool: Workspace, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return pool.empty(shape, dtype, CPU)


def test_gives_ordinary_tensors() -> None:
    value = take(Workspace(), 300, 1001)
    assert value.shape == (300, 1001) and value.stride() == (1001, 1) and value.is_contiguous()
    assert value.dtype == torch.float32 and not value.requires_grad and value.is_leaf and value._base is None
    assert value.data_ptr() % 64 == 0
    value[:] = 1.0
    weight = torch.zeros(300, 1001, requires_grad=True)
    (weight * value).sum().backward()
    assert weight.grad is not None and weight.grad.eq(1).all()


def test_memory_comes_back_when_nobody_holds_it() -> None:
    pool = Workspace()
    value = take(pool, 2 * ROWS)
    where = value.data_ptr()
    view = value.view(2, ROWS)[1]
    del value
    assert take(pool, 2 * ROWS).data_ptr() != where, "a view still holds it"
    del view
    assert where in {take(pool, 2 * ROWS).data_ptr(), take(pool, 2, ROWS, dtype=torch.int32).data_ptr()}
    assert pool.stats().reused >= 1


def holders(value: torch.Tensor) -> dict:
    """Everything that may keep memory alive without keeping the tensor object."""
    leaf = value.new_zeros(value.shape).requires_grad_()
    return {
        "view": value[1:],
        "detach": value.detach(),
        "data": value.data,
        "numpy": value.numpy(),
        "storage": value.untyped_storage(),
        "saved for backward": leaf * value,
        "memoryview": memoryview(value.numpy()),
        "dlpack": torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(value)),
        "lazy clone": torch._lazy_clone(value),
    }


@pytest.mark.parametrize("name", holders(torch.zeros(4)))
def test_nothing_that_is_still_read_is_given_out_again(name) -> None:
    pool = Workspace()
    value = take(pool, 2 * ROWS).fill_(5.0)
    held = holders(value)[name]
    del value
    for _ in range(3):
        take(pool, 2 * ROWS).fill_(-1.0)
    if name == "saved for backward":
        (got,) = torch.autograd.grad(held.sum(), held.grad_fn.next_functions[0][0].variable)
    elif "storage" in name:
        got = torch.empty(0).set_(held)
    else:
        got = torch.as_tensor(held)
    assert (got == 5.0).all()


def test_a_gradient_is_taken_over_without_a_copy_and_returns_with_zero_grad() -> None:
    pool, where = Workspace(), []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            out = take(pool, 2 * ROWS)
            where.append(out.data_ptr())
            return torch.mul(grad, 2, out=out)

    weight = torch.zeros(2 * ROWS, requires_grad=True)
    for _ in range(3):
        weight.grad = None
        Double.apply(weight).sum().backward()
        assert weight.grad.data_ptr() == where[-1] and weight.grad.eq(2).all()
    assert len(set(where)) == 1
    Double.apply(weight).sum().backward()
    assert weight.grad.eq(4).all() and len(set(where)) == 2


def test_shared_or_resized_memory_is_never_reused() -> None:
    pool = Workspace()
    value = take(pool, 2 * ROWS).fill_(5.0)
    value.share_memory_()  # moves the storage in place: another process may hold it when we no longer do
    del value
    take(pool, 2 * ROWS).fill_(-1.0)
    assert pool.stats().reused == 0
    value = take(pool, 4 * ROWS)
    value.untyped_storage().resize_(0)
    del value
    take(pool, 4 * ROWS).fill_(0.0)
    assert pool.stats().reused == 0


def test_the_limit_holds_and_free_memory_is_dropped_for_it() -> None:
    pool = Workspace(limit_bytes=3 * SMALLEST_BYTES)
    kept = take(pool, 2 * ROWS)
    over = take(pool, 2 * ROWS + ROWS // 2)
    assert over.fill_(1.0).eq(1).all() and pool.stats().bypassed == 1
    assert pool.stats().held_bytes <= pool.limit_bytes
    del kept
    take(pool, 3 * ROWS)
    assert pool.stats().created == 2 and pool.stats().held_bytes == 3 * SMALLEST_BYTES
    pool.clear()
    assert pool.stats().held_bytes == 0


def test_small_tensors_and_other_devices_are_left_to_torch() -> None:
    pool = Workspace()
    take(pool, ROWS - 1)
    take(pool, 0)
    assert pool.empty((ROWS,), torch.float32, torch.device("meta")).device.type == "meta"
    with torch._subclasses.FakeTensorMode():
        assert isinstance(take(pool, 4 * ROWS), torch._subclasses.FakeTensor)
    assert pool.stats().created == 0


def test_buckets_waste_at_most_a_sixteenth_and_nothing_for_usual_weights() -> None:
    for size_bytes in (*range(SMALLEST_BYTES, SMALLEST_BYTES + 5000, 7), 10**7 + 1, 2**31 + 5):
        assert size_bytes <= workspace._bucket(size_bytes) <= size_bytes * (1 + 1 / 16) + 64
    for shape in ((8, 2048, 512), (8, 1024, 4096), (16, 1536, 2048), (8, 768, 1024)):
        size_bytes = 4 * shape[0] * shape[1] * shape[2]
        assert workspace._bucket(size_bytes) == size_bytes


def test_a_little_fewer_rows_find_the_memory_of_a_little_more() -> None:
    pool, rng = Workspace(), torch.Generator().manual_seed(0)
    for rows in torch.randint(900, 1100, (50,), generator=rng).tolist():
        take(pool, rows, 512).fill_(1.0)
    assert pool.stats().held_bytes < 4 * 1100 * 512 * 4
    take(pool, 4 * ROWS)
    assert take(pool, 2 * ROWS).untyped_storage().nbytes() == 8 * ROWS, "twice the size is too much to take"


def test_is_poisoned_like_torch_empty(poison) -> None:
    pool = Workspace()
    for _ in range(2):
        value = take(pool, 2 * ROWS)
        assert value.isnan().all()
        value.fill_(1.0)
        del value
    assert pool.stats().reused == 1


def test_two_threads_never_get_the_same_memory() -> None:
    pool, wrong = Workspace(), []

    def work(mark: float) -> None:
        for _ in range(200):
            mine = [take(pool, ROWS).fill_(mark) for _ in range(2)]
            if not all(bool((value[:: ROWS // 8] == mark).all()) for value in mine):
                wrong.append(mark)

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and pool.stats().reused > 0


def test_a_flag_of_torch_that_stayed_set_does_not_keep_the_pool_away(monkeypatch) -> None:
    """After a selective checkpoint torch 2.13 says that a dispatch mode is on, and there is none."""
    from torch.utils import _python_dispatch

    class Mode(_python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(_python_dispatch, "_is_in_torch_dispatch_mode", True)
    assert _python_dispatch.is_in_torch_dispatch_mode()
    pool = Workspace()
    take(pool, 2 * ROWS)
    assert pool.stats().created == 1
    with Mode():
        take(pool, 2 * ROWS)
    assert pool.stats().created + pool.stats().reused == 1


ROW_BYTES = 4 * ROWS
"""Of `take(pool, ROWS)`, a storage of its bucket's size exactly."""


def test_a_peak_is_of_what_is_held_at_once() -> None:
    pool = Workspace()
    before = take(pool, 8 * ROWS)
    with pool.measured_peak() as peak:
        assert peak.bytes == 0, "what was held before does not count"
        one = take(pool, 2 * ROWS)
        take(pool, 4 * ROWS)
        assert peak.bytes == 6 * ROW_BYTES
        two = take(pool, 2 * ROWS)  # the 4 are free again
        view, two = two[:1], None
        assert peak.bytes == 6 * ROW_BYTES
        take(pool, 3 * ROWS)
        assert peak.bytes == 7 * ROW_BYTES, "a view holds all of its storage"
        one = view = None
        take(pool, ROWS)
        assert peak.bytes == 7 * ROW_BYTES
    take(pool, 16 * ROWS)
    assert peak.bytes == 7 * ROW_BYTES and before.numel() == 8 * ROWS and one is view is two


def test_storages_are_reused_while_a_peak_is_measured() -> None:
    pool = Workspace()
    with pool.measured_peak() as peak:
        for _ in range(5):
            take(pool, 2 * ROWS).fill_(1.0)
    assert pool.stats().created == 1 and pool.stats().reused == 4 and peak.bytes == 2 * ROW_BYTES


def test_what_autograd_saves_is_held() -> None:
    pool, leaf = Workspace(), torch.zeros(ROWS, requires_grad=True)
    with pool.measured_peak() as peak:
        y = leaf * take(pool, ROWS).fill_(2.0)
        take(pool, ROWS)
        assert peak.bytes == 2 * ROW_BYTES
        y.sum().backward()
        take(pool, 2 * ROWS)
        assert peak.bytes == 2 * ROW_BYTES and y.shape == (ROWS,)


def test_a_peak_counts_what_is_small_or_beyond_the_limit_and_no_gradient_of_a_weight() -> None:
    pool = Workspace(limit_bytes=2 * ROW_BYTES)
    with pool.measured_peak() as peak:
        small = [take(pool, 10) for _ in range(3)]
        assert peak.bytes == 120
        large = [take(pool, ROWS) for _ in range(4)]
        assert pool.stats().bypassed == 2 and peak.bytes == 120 + 4 * ROW_BYTES
        pool.empty((8 * ROWS,), torch.float32, CPU, rows=False)
        pool.empty((ROWS,), torch.float32, torch.device("meta"))
        with torch._subclasses.FakeTensorMode():
            take(pool, 8 * ROWS)
        assert peak.bytes == 120 + 4 * ROW_BYTES and len(small) + len(large) == 7


def test_one_peak_at_a_time_and_none_after_an_error() -> None:
    pool = Workspace()
    with pytest.raises(ValueError), pool.measured_peak():
        with pytest.raises(ConfigError, match="another"), pool.measured_peak():
            pass
        raise ValueError
    with pool.measured_peak() as peak:
        take(pool, ROWS)
    assert peak.bytes == ROW_BYTES


def test_a_torch_that_does_not_count_users_cannot_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "_use_count", None)
    with pytest.raises(ConfigError, match="measured_peak"), Workspace().measured_peak():
        pass


def test_threads_are_counted_together() -> None:
    pool, held = Workspace(), []
    with pool.measured_peak() as peak:
        threads = [threading.Thread(target=lambda: held.append(take(pool, ROWS))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert peak.bytes == 4 * ROW_BYTES == sum(value.nbytes for value in held)

import concurrent.futures
import errno
import os

import numpy as np
import pytest
from loha_jax.interop.disk.direct_file import DirectFile


@pytest.mark.parametrize("system", ["as it is", "without O_DIRECT", "refuses to open", "refuses to write"])
@pytest.mark.parametrize("shift", [0, 1, 4095, 4096, 5000])
def test_values_stand_at_their_places_whatever_their_sizes(system, shift, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    random = np.random.default_rng(shift)
    sizes = [*random.integers(1, 20_000, 40), 1, 4096, 8192, 0, 100_000]
    places = shift + np.cumsum([0, *sizes])
    values = [random.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    path = tmp_path / "file"
    path.write_bytes(b"something longer that was there" * 10_000)
    real_open, real_pwrite = os.open, os.pwrite
    direct = getattr(os, "O_DIRECT", 0)
    if system == "without O_DIRECT":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)
    elif system == "refuses to open":
        monkeypatch.setattr(os, "open", lambda p, f, *m: refuse() if direct and f & direct else real_open(p, f, *m))
    file = DirectFile(path, int(places[-1]))
    if system == "refuses to write":
        direct_descriptor = file._direct
        monkeypatch.setattr(os, "pwrite", lambda d, *a: refuse() if d == direct_descriptor else real_pwrite(d, *a))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        order = random.permutation(len(values))
        list(pool.map(lambda n: file.write(int(places[n]), values[n]), order))
    file.close()
    assert path.read_bytes() == b"\0" * shift + b"".join(value.tobytes() for value in values)


def test_other_errors_are_errors(tmp_path, monkeypatch):
    file = DirectFile(tmp_path / "file", 100_000)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        file.write(10, np.zeros(50_000, np.uint8))
    file.close()
    with pytest.raises(FileNotFoundError):
        DirectFile(tmp_path / "none" / "file", 10)

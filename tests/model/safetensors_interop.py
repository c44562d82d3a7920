"""Files of ours read by the public safetensors package, and the other way round. Skipped (exit code 77) without it."""
import subprocess
import sys
import tempfile
from pathlib import Path

SKIPPED = 77
try:
    import numpy as np
    from safetensors import safe_open
    from safetensors.numpy import save_file
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(SKIPPED)

program = sys.argv[1]
want = {
    "layer.0.weight": (0.5 * np.arange(6, dtype=np.float32) - 1).reshape(2, 3),
    "vector \u00e9": np.arange(5, dtype=np.float64) / 4,
    "integers": (np.arange(4, dtype=np.int64) - 2).reshape(2, 2),
    "bytes": np.arange(253, 256).astype(np.uint8),
    "scalar": np.array(2.5, dtype=np.float32),
    "empty": np.zeros((0, 7), dtype=np.float32),
}
metadata = {"quote": '"\\\n'}

with tempfile.TemporaryDirectory() as folder:
    ours, theirs = Path(folder) / "ours.safetensors", Path(folder) / "theirs.safetensors"
    subprocess.run([program, "write", ours], check=True)
    with safe_open(ours, framework="np") as file:
        assert file.metadata() == metadata, file.metadata()
        assert set(file.keys()) == set(want), file.keys()
        for name, value in want.items():
            got = file.get_tensor(name)
            assert got.dtype == value.dtype and got.shape == value.shape and np.array_equal(got, value), name
    save_file(want, theirs, metadata=metadata)
    subprocess.run([program, "check", theirs], check=True)
print("both directions agree")

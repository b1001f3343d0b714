"""What importing costs, and which arrows between the packages exist."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAY_IMPORT = {
    "bert6_jax": {"bert6_jax"},
    "sae_jax": {"sae_jax", "bert6_jax"},
    "synthetic": {"synthetic", "bert6_jax"},
    "experiments": {"experiments", "sae_jax", "synthetic", "bert6_jax"},
}


def imports(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_arrows_point_one_way():
    for package, allowed in MAY_IMPORT.items():
        for file in (ROOT / package).rglob("*.py"):
            assert set(imports(file)) & set(MAY_IMPORT) <= allowed, file


def test_importing_the_package_and_its_rooms_is_quick_and_light():
    """CPU seconds, which a busy machine does not stretch; torch, TFDS and matplotlib stay where they are."""
    code = """
import time, sys
start = time.process_time()
import bert6_jax
bare = time.process_time() - start
import bert6_jax.train, bert6_jax.readout, bert6_jax.metrics, bert6_jax.hf, bert6_jax.data.windows, experiments.apt
heavy = {"torch", "transformers", "tensorflow", "tensorflow_datasets", "matplotlib", "pandas", "scipy.stats"}
print(bare, sorted(heavy & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    seconds, loaded = out.split(" ", 1)
    assert float(seconds) < 1.5 and loaded.strip() == "[]"

"""DeepSpeed on the CPU, wherever the tests run."""

import os

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

"""Packaging. The scripts run from a checkout: `pip install -e .`"""

from setuptools import find_packages, setup

EXTRAS = {
    "plot": ["matplotlib"],
    "tensorboard": ["tensorboard"],
    "wandb": ["wandb>=0.31"],
    "parquet": ["pyarrow"],
    "clean": ["trafilatura", "lxml_html_clean", "warcio", "zstandard"],
    "gguf": ["gguf"],
    "hf": ["tokenizers", "jinja2"],
    "serve": ["uvicorn"],
    "bench": ["transformers>=5", "peft", "xllamacpp"],
    "harness": ["lm_eval[hf]>=0.4.13"],
    "align": ["trl", "accelerate", "datasets", "transformers>=5"],
}
EXTRAS["test"] = [
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "ruff",
    "transformers>=5",
    "peft",
    "regex",
    "playwright",
    "openai",
    *EXTRAS["hf"],
    *EXTRAS["serve"],
    *EXTRAS["plot"],
    *EXTRAS["parquet"],
    *EXTRAS["clean"],
    *EXTRAS["tensorboard"],
    *EXTRAS["gguf"],
    *EXTRAS["harness"],
]

setup(
    name="minillm",
    version="0.1.0",
    description="Train a language model from scratch and understand every line of it",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["minillm*", "kernels*"]),
    # One folder on the path: an editable install then also finds `data`, which no wheel contains.
    package_dir={"": "."},
    package_data={"minillm.serving": ["chat.html"]},
    install_requires=[
        "torch>=2.11",
        "numpy",
        "sentencepiece[protobuf]",
        "safetensors",
        "tqdm",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require=EXTRAS,
)

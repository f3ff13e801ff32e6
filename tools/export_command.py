"""`vlmrt export`: its options."""

from __future__ import annotations

import argparse

from vlmrt.tools.engine_options import add_engine_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Make the files of a vision tower for --vit-engine onnxruntime or tensorrt, as a launch does that does not "
        "find them."
    )
    parser.add_argument("--model", metavar="DIR|HUB_ID", help="a local directory or a hub id; default: the demo model")
    parser.add_argument("--revision", default="main", metavar="NAME", help="branch, tag or commit of the hub id")
    parser.add_argument("--engine", choices=("onnx", "tensorrt"), default="onnx", help="onnx: for onnxruntime")
    parser.add_argument("--output", metavar="DIR", help="a new directory for the files; default: in the cache")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="that will run it")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of the tower")
    add_engine_files(parser)


def run(arguments: argparse.Namespace) -> int:
    from vlmrt.tools.export import export

    return export(arguments)

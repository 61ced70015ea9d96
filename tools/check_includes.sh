#!/bin/sh
# csrc/ knows neither torch nor Python: fails where one of its files includes a header of theirs.
if git grep -nIE '#include *[<"](torch/|ATen/|c10/|Python\.h|pybind11)' -- csrc; then
  echo "csrc/ must include neither torch nor Python headers" >&2
  exit 1
fi

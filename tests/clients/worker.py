"""`worker.py PROGRAM.py URL MODEL`: a program that uses a client, and stays, so that its imports are paid once.

A line of JSON in, {"call": FUNCTION, "with": ARGUMENTS}; a line out, {"value": ...} or {"raised": CLASS, "says": TEXT}.
"""

import importlib.util
import json
import os
import sys


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    path, url, model = sys.argv[1:]
    spec = importlib.util.spec_from_file_location("program", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    program.connect(url, model)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"value": getattr(program, asked["call"])(**asked["with"])}
        except Exception as err:
            answer = {"raised": type(err).__name__, "says": str(err)}
        print(json.dumps(answer, default=str), file=answers, flush=True)


if __name__ == "__main__":
    main()

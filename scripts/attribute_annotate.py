"""Grade the turns of a chat file with a served value model (SteerLM step 2).

    python scripts/megatron_gpt_eval.py gpt_model_file=value.nemo server=True port=1424      # in another shell
    python scripts/attribute_annotate.py --input_file_name=data/oasst_v2t_train.jsonl \
        --output_file_name=data/oasst_v2t_train_value_output.jsonl --port_num=1424 --output_type=VALUE_TO_TEXT

Stopped or killed, it goes on where it was when the same command is run again.
"""

import argparse

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags

COMPAT = "nemo1.23"
TURNS = "which turns to grade (assistant: a value model never learns attributes of user turns; all with --compat)"


def parse_args() -> argparse.Namespace:
    description = "Grade the turns of a chat file with a served value model."
    parser = Flags(description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.flag
    flag("input_file_name", default="input.jsonl", help="chat records, .jsonl or .jsonl.gz")
    flag("output_file_name", default="output.jsonl", help="appears when every record is annotated")
    flag("host", default="localhost", help="where the value model is served")
    flag("port_num", type=int, default=1424, help="its port")
    flag("endpoints", help="HOST:PORT,HOST:PORT,...: several servers of one model share the work; instead of the two")
    flag("batch_size", type=int, default=8, help="conversations per request; attributes do not depend on it")
    flag("concurrency", type=int, default=16, help="requests under way at a time, per server")
    flag("process_lang", type=boolean, nargs="?", const=True, default=True, help="write lang, if the model knows it")
    flag("turns", choices=("assistant", "all"), help=TURNS)
    flag("mode", choices=("line", "slots"), help="one request per turn (line), or per value (slots; with --compat)")
    flag(
        "output_type",
        default="keep",
        choices=("keep", "VALUE_TO_TEXT", "TEXT_TO_VALUE"),
        help="`type` of the output records; VALUE_TO_TEXT makes them ready to train the SteerLM model on",
    )
    flag("only_missing", action="store_true", help="keep human values; the model adds what they lack, knowing them")
    flag("soft", action="store_true", help="keep probabilities, expected value and confidence as label_soft")
    flag("retries", type=int, default=8, help="how often a request is sent again, with growing pauses")
    flag("timeout_s", type=float, default=600.0, help="seconds to wait for one answer")
    flag("allow_rejected", action="store_true", help="finish without records that cannot be annotated")
    flag("compat", choices=(COMPAT,), help="grade as the reference does: every turn, one value per request")
    return parser.parse_args()


def boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")
    return text.lower() == "true"


def main() -> None:
    args = parse_args()
    from steerlm_nemo.annotation.annotate import annotate
    from steerlm_nemo.annotation.thread import AnnotationSettings
    from steerlm_nemo.client.pool import ServerPool, parse_endpoints

    settings = AnnotationSettings(
        turns=args.turns or ("all" if args.compat else "assistant"),
        mode=args.mode or ("slots" if args.compat else "line"),
        output_type=args.output_type,
        process_lang=args.process_lang,
        only_missing=args.only_missing,
        soft=args.soft,
        compat=args.compat is not None,
    )
    addresses = parse_endpoints(args.endpoints) if args.endpoints else [(args.host, args.port_num)]
    with ServerPool(addresses, args.timeout_s, args.retries, args.concurrency) as servers:
        summary = annotate(
            args.input_file_name,
            args.output_file_name,
            servers,
            settings,
            batch_size=args.batch_size,
            allow_rejected=args.allow_rejected,
        )
    print(summary.text())
    print(f"{args.output_file_name} written; {servers.num_requests} requests, {servers.num_retries} of them retries")


if __name__ == "__main__":
    exit_with_message(main)

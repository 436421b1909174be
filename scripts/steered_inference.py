"""Ask a served SteerLM model for responses at chosen attribute values (SteerLM step 4).

    python scripts/megatron_gpt_eval.py gpt_model_file=steerlm.nemo server=True port=1427    # in another shell
    python scripts/steered_inference.py --prompt="What is a dog?" --attributes=quality:4,humor:0

Many at once: --input_file prompts.jsonl, one {"prompt": "..."} or {"messages": [...]} a line, each with
"attributes": {...} and "system": "..." of its own if it wants them. Stopped or killed, it goes on where it was when the
same command is run again.
"""

import argparse

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags


def parse_args() -> argparse.Namespace:
    description = "Ask a served SteerLM model for responses at chosen attribute values."
    parser = Flags(description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.flag
    flag("prompt", help="the user's message")
    flag("attributes", default="", help="for example quality:4,humor:0; the rest gets the model's defaults")
    flag("system", help="system prompt; without it, the one of the training data")
    flag("host", default="localhost", help="where the SteerLM model is served")
    flag("port_num", type=int, default=1427, help="its port")
    flag("tokens_to_generate", type=int, default=512, help="longest response, in tokens")
    flag("greedy", action="store_true", help="always the likeliest token; so it is if no other sampling flag is given")
    flag("temperature", type=float, help="sample at this temperature")
    flag("top_k", type=int, help="sample from the k likeliest tokens")
    flag("top_p", type=float, help="sample from the likeliest tokens that make up this probability")
    flag("random_seed", type=int, help="of the sampling")
    flag("input_file", help="JSONL of prompts or messages, instead of --prompt")
    flag("output_file", help="JSONL: the input records with `response` and `response_attributes` added")
    flag("endpoints", help="HOST:PORT,HOST:PORT,...: several servers of one model share the work; instead of the two")
    flag("batch_size", type=int, default=8, help="records of --input_file per request")
    flag("concurrency", type=int, default=4, help="requests under way at a time, per server")
    flag("allow_rejected", action="store_true", help="finish without records that cannot be answered")
    flag("retries", type=int, default=8, help="how often a request is sent again, with growing pauses")
    flag("timeout_s", type=float, default=600.0, help="seconds to wait for one answer")
    args = parser.parse_args()
    if (args.prompt is None) == (args.input_file is None):
        parser.error("give either --prompt or --input_file")
    if (args.input_file is None) != (args.output_file is None):
        parser.error("--input_file and --output_file go together")
    drawn = [name for name in ("temperature", "top_k", "top_p", "random_seed") if getattr(args, name) is not None]
    if args.greedy and drawn:
        parser.error(f"--greedy draws nothing, so --{drawn[0]} has no meaning beside it")
    args.greedy = not drawn
    return args


def main() -> None:
    args = parse_args()
    from steerlm_nemo.client.pool import ServerPool, parse_endpoints
    from steerlm_nemo.conversation import SYSTEM_PROMPT
    from steerlm_nemo.steering.steer import Sampling, parse_attributes, steer, steer_file

    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p") if getattr(args, name) is not None}
    sampling = Sampling(args.tokens_to_generate, args.greedy, random_seed=args.random_seed, **given)
    attributes = parse_attributes(args.attributes)
    system = SYSTEM_PROMPT if args.system is None else args.system
    addresses = parse_endpoints(args.endpoints) if args.endpoints else [(args.host, args.port_num)]
    with ServerPool(addresses, args.timeout_s, args.retries, args.concurrency) as servers:
        if args.prompt is not None:
            response = steer(args.prompt, attributes, servers, system=system, sampling=sampling)
            print(response.text)
            return
        done = steer_file(
            args.input_file,
            args.output_file,
            attributes,
            servers,
            args.batch_size,
            system=system,
            sampling=sampling,
            allow_rejected=args.allow_rejected,
        )
    print(done.text())
    print(f"{args.output_file} written; {servers.num_requests} requests, {servers.num_retries} of them retries")


if __name__ == "__main__":
    exit_with_message(main)

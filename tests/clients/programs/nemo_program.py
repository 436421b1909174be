"""NeMo's own client functions, of the pinned nemo_toolkit: what its web page calls for a text."""

from nemo.collections.nlp.modules.common.megatron.retrieval_services.util import text_generation
from nemo.collections.nlp.modules.common.megatron_web_server import create_gen_function


def connect(url, model):
    global PORT
    PORT = int(url.rpartition(":")[2])


def generate(**body):
    return text_generation(body, ip="127.0.0.1", port=PORT)


def page(prompt, **settings):
    """The text after the prompt, as the page cuts it off."""
    keys = ("greedy", "add_BOS", "token_to_gen", "min_tokens", "temp", "top_p", "top_k", "repetition", "end_strings")
    return create_gen_function(PORT)(prompt, *(settings[key] for key in keys))

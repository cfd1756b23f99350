"""Recipes for other structures that are wrong, and what a refusal must say of each."""

from __future__ import annotations

from dataclasses import dataclass

RECIPE, MODEL = 2, 3
"""Exit codes: the recipe asks for what cannot be, or inputs do not fit."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A recipe and its refusal.

    Attributes:
        text: The recipe.
        code: The exit code.
        said: Parts of the message: what was found and what was expected, or what can be done.
    """

    text: str
    code: int
    said: tuple[str, ...]


def stack(*sources: str) -> str:
    listed = "".join(f"  - sources: [{source}]\n" for source in sources)
    return f"merge_method: passthrough\nslices:\n{listed}"


def upscale(parameters: str, models: str = "{model: a}", more: str = "") -> str:
    return f"merge_method: depth_upscale\nmodels: [{models}]\nparameters: {parameters}\n{more}"


def upcycle(parameters: str, base: str = "a", models: str = "") -> str:
    listed = f"models: [{models}]\n" if models else ""
    return f"merge_method: sparse_upcycle\nbase_model: {base}\nparameters: {parameters}\n{listed}"


def of_one(method: str, parameters: str, model: str = "a", more: str = "") -> str:
    return f"merge_method: {method}\nmodels: [{{model: {model}}}]\nparameters: {parameters}\n{more}"


def a_slice(text: str) -> str:
    return f"merge_method: passthrough\nslices:\n  - {text}\n"


def linear(*models: str) -> str:
    listed = ", ".join(f"{{model: {model}, parameters: {{weight: 1}}}}" for model in models)
    return f"merge_method: linear\nmodels: [{listed}]\n"


def moe(more: str, experts: str = "[{source_model: a}, {source_model: b}]") -> str:
    """Return a recipe of mergekit-moe."""
    return f"base_model: a\n{more}\nexperts: {experts}\n"


A, B = "{model: a, layer_range: [0, 2]}", "{model: b, layer_range: [0, 2]}"
PROMPTED = "{model: a, positive_prompts: [code]}, {model: b, positive_prompts: [maths]}"

STACKS = {
    "past the end": Wrong(
        stack("{model: a, layer_range: [0, 5]}"), RECIPE, ("r.yaml:3:15", "[0, 5]", "4 layers")
    ),
    "starts past the end": Wrong(
        stack("{model: a, layer_range: [7, 9]}"), RECIPE, ("r.yaml:3:15", "[7, 9]", "4 layers")
    ),
    "negative": Wrong(
        stack("{model: a, layer_range: [-1, 2]}"),
        RECIPE,
        ("r.yaml:3:40", "is -1", "expected"),
    ),
    "backwards": Wrong(
        stack("{model: a, layer_range: [3, 1]}"),
        RECIPE,
        ("r.yaml:3:39", "[3, 1]", "smaller number first"),
    ),
    "empty": Wrong(stack("{model: a, layer_range: [2, 2]}"), RECIPE, ("r.yaml:3:5", "no layer")),
    "of parts of layers": Wrong(
        stack("{model: a, layer_range: [0, 1.5]}"),
        RECIPE,
        ("r.yaml:3:43", "1.5"),
    ),
    "of three numbers": Wrong(
        stack("{model: a, layer_range: [0, 1, 2]}"), RECIPE, ("r.yaml:3:39", "list of 3")
    ),
    "a text": Wrong(stack("{model: a, layer_range: 0-2}"), RECIPE, ("r.yaml:3:39", "'0-2'")),
    "none": Wrong(stack("{model: a}"), RECIPE, ("r.yaml:3:15", "layer_range is missing")),
    "range and list": Wrong(
        stack("{model: a, layer_range: [0, 2], layers: [0]}"), RECIPE, ("r.yaml:3:47", "both")
    ),
    "empty list": Wrong(stack("{model: a, layers: []}"), RECIPE, ("r.yaml:3:34", "empty list")),
    "list past the end": Wrong(
        stack("{model: a, layers: [0, 4]}"), RECIPE, ("r.yaml:3:15", "4", "4 layers")
    ),
    "list with a negative": Wrong(
        stack("{model: a, layers: [0, -1]}"),
        RECIPE,
        ("r.yaml:3:38", "is -1"),
    ),
    "list that is a number": Wrong(stack("{model: a, layers: 3}"), RECIPE, ("r.yaml:3:34", "is 3")),
    "list of lists": Wrong(
        stack("{model: a, layers: [[0, 1]]}"),
        RECIPE,
        ("r.yaml:3:35",),
    ),
    "list of words": Wrong(
        stack("{model: a, layers: [true]}"),
        RECIPE,
        ("r.yaml:3:35", "true"),
    ),
    "list that repeats": Wrong(
        stack("{model: a, layers: [0, 0, 1]}"), RECIPE, ("r.yaml:3:38", "layer 0", "twice")
    ),
    "misspelt": Wrong(
        stack("{model: a, layer_ranges: [0, 2]}"),
        RECIPE,
        ("r.yaml:3:26", "'layer_ranges'", "'layer_range'"),
    ),
    "unequal sources": Wrong(
        a_slice(f"{{merge_method: linear, sources: [{A}, {{model: b, layers: [1, 2, 3]}}]}}"),
        RECIPE,
        ("3 layers", "2"),
    ),
    "no source": Wrong(a_slice("sources: []"), RECIPE, ("r.yaml:3:14", "empty list")),
    "no slice": Wrong(
        "merge_method: passthrough\nslices: []\n",
        RECIPE,
        ("r.yaml:1:1", "slices"),
    ),
    "slices and models": Wrong(stack(A) + "models: [{model: a}]\n", RECIPE, ("models and slices",)),
    "two models where one passes": Wrong(
        stack(f"{A}, {B}"), RECIPE, ("passthrough takes 1 model", "found 2")
    ),
    "another hidden size": Wrong(
        stack(A, "{model: wide, layer_range: [0, 2]}"),
        MODEL,
        ("r.yaml:4:15", "layer 0", "wide", "hidden_size is 16", "8"),
    ),
    "another width of MLPs": Wrong(
        stack(A, "{model: wide_mlp, layer_range: [0, 2]}"),
        MODEL,
        ("r.yaml:4:15", "[8, 20]", "[8, 12]", "intermediate_size"),
    ),
    "another architecture": Wrong(
        stack(A, "{model: qwen2, layer_range: [0, 2]}"), MODEL, ("r.yaml:4:15", "k_proj.bias")
    ),
    "experts beside none": Wrong(
        stack(A, "{model: moe, layer_range: [0, 2]}"), MODEL, ("r.yaml:4:15", "experts.0.w1")
    ),
    "another number of experts": Wrong(
        stack("{model: moe, layer_range: [0, 2]}", "{model: moe3, layer_range: [0, 2]}"),
        MODEL,
        ("r.yaml:4:15", "num_local_experts is 3", "4"),
    ),
    "a head of another vocabulary": Wrong(
        stack(A, "{model: words, layer_range: [0, 2]}"),
        MODEL,
        ("lm_head.weight", "[14, 8]", "[10, 8]"),
    ),
    "no such model": Wrong(
        stack("{model: nowhere, layer_range: [0, 2]}"), MODEL, ("r.yaml:3:23", "'nowhere'")
    ),
    "no such method": Wrong(
        a_slice(f"{{merge_method: passthru, sources: [{A}]}}"),
        RECIPE,
        ("'passthru'", "'passthrough'"),
    ),
    "a method that builds a model": Wrong(
        a_slice(f"{{merge_method: depth_upscale, sources: [{A}]}}"),
        RECIPE,
        ("depth_upscale", "slice"),
    ),
    "a method that makes an adapter": Wrong(
        a_slice(f"{{merge_method: lora_svd, sources: [{A}]}}"), RECIPE, ("lora_svd", "slice")
    ),
    "a method without its base": Wrong(
        a_slice(f"{{merge_method: ties, sources: [{A}, {B}]}}"),
        RECIPE,
        ("ties needs the base model",),
    ),
    "a threshold that breaks": Wrong(
        stack(
            "{model: qwen2_window, layer_range: [0, 4]}",
            "{model: qwen2_window, layer_range: [0, 2]}",
        ),
        RECIPE,
        ("max_window_layers", "output layer 4"),
    ),
    "a factor that is a word": Wrong(
        stack("{model: a, layer_range: [0, 2], parameters: {scale: big}}"),
        RECIPE,
        ("r.yaml:3:67", "'big'"),
    ),
    "no such module": Wrong(
        "merge_method: passthrough\nbase_model: a\n"
        f"modules: {{vision: {{slices: [{{sources: [{A}]}}]}}}}\n",
        RECIPE,
        ("'vision'", "default"),
    ),
}
DEPTHS = {
    "no size": Wrong(upscale("{}"), RECIPE, ("target_layers is missing", "overlap")),
    "both sizes": Wrong(
        upscale("{target_layers: 6, overlap: 1}"),
        RECIPE,
        ("r.yaml:3:41", "overlap", "target_layers"),
    ),
    "no deeper": Wrong(upscale("{target_layers: 4}"), RECIPE, ("r.yaml:3:29", "is 4", "5 to 8")),
    "more than both": Wrong(
        upscale("{target_layers: 9}"), RECIPE, ("r.yaml:3:29", "is 9", "5 to 8")
    ),
    "no layers": Wrong(upscale("{target_layers: 0}"), RECIPE, ("r.yaml:3:29", "is 0")),
    "a word": Wrong(
        upscale("{target_layers: many}"),
        RECIPE,
        ("r.yaml:3:29", "'many'"),
    ),
    "a part of a layer": Wrong(
        upscale("{target_layers: 5.5}"),
        RECIPE,
        ("r.yaml:3:29", "5.5"),
    ),
    "a list": Wrong(upscale("{target_layers: [5, 6]}"), RECIPE, ("r.yaml:3:29", "list")),
    "negative overlap": Wrong(upscale("{overlap: -1}"), RECIPE, ("r.yaml:3:23", "is -1")),
    "all is overlap": Wrong(upscale("{overlap: 4}"), RECIPE, ("r.yaml:3:23", "is 4", "0 to 1")),
    "half is overlap": Wrong(
        upscale("{overlap: 2}"), RECIPE, ("r.yaml:3:23", "would not be deeper")
    ),
    "all is summed": Wrong(
        upscale("{overlap: 4, overlap_mode: sum}"), RECIPE, ("r.yaml:3:23", "0 to 3")
    ),
    "no such mode": Wrong(
        upscale("{overlap: 1, overlap_mode: mean}"), RECIPE, ("r.yaml:3:40", "'mean'", "drop")
    ),
    "no such blend": Wrong(
        upscale("{overlap: 1, overlap_mode: sum, blend: lerp}"),
        RECIPE,
        ("r.yaml:3:52", "'lerp'", "slerp"),
    ),
    "a share above 1": Wrong(
        upscale("{overlap: 1, overlap_mode: sum, t: 1.5}"), RECIPE, ("r.yaml:3:48", "1.5", "[0, 1]")
    ),
    "three models": Wrong(
        upscale("{overlap: 1}", "{model: a}, {model: b}, {model: c}"), RECIPE, ("found 3",)
    ),
    "no model": Wrong(
        "merge_method: depth_upscale\nparameters: {overlap: 1}\n",
        RECIPE,
        ("r.yaml:1:1", "models"),
    ),
    "another hidden size": Wrong(
        upscale("{overlap: 1}", "{model: a}, {model: wide}"), MODEL, ("hidden_size is 16", "8")
    ),
    "another architecture": Wrong(
        upscale("{overlap: 1}", "{model: a}, {model: qwen3}"), MODEL, ("k_norm",)
    ),
    "another vocabulary": Wrong(
        upscale("{overlap: 1}", "{model: a}, {model: words}"),
        MODEL,
        ("lm_head.weight", "vocab_size"),
    ),
    "expansion to no size": Wrong(
        upscale("{block_expansion: true}"), RECIPE, ("target_layers is missing",)
    ),
    "expansion by an overlap": Wrong(
        upscale("{block_expansion: true, overlap: 1}"), RECIPE, ("overlap",)
    ),
    "expansion of two": Wrong(
        upscale("{block_expansion: true, target_layers: 6}", "{model: a}, {model: b}"),
        RECIPE,
        ("takes one model", "2"),
    ),
    "expansion to no more": Wrong(
        upscale("{block_expansion: true, target_layers: 4}"), RECIPE, ("is 4", "5 to 8")
    ),
    "maybe": Wrong(
        upscale("{block_expansion: maybe, target_layers: 6}"),
        RECIPE,
        ("'maybe'", "true or false"),
    ),
    "a threshold that breaks": Wrong(
        upscale("{overlap: 1}", "{model: qwen2_window}"), RECIPE, ("max_window_layers",)
    ),
    "slices": Wrong(
        f"merge_method: depth_upscale\nslices: [{{sources: [{A}]}}]\nparameters: {{overlap: 1}}\n",
        RECIPE,
        ("no slices",),
    ),
    "modules": Wrong(
        upscale("{overlap: 1}").replace(
            "models: [{model: a}]", "base_model: a\nmodules: {default: {models: [{model: a}]}}"
        ),
        RECIPE,
        ("no modules",),
    ),
    "misspelt": Wrong(
        upscale("{target_layer: 6}"), RECIPE, ("r.yaml:3:14", "'target_layer'", "'target_layers'")
    ),
    "a later average with the shallow one": Wrong(
        "name: deep\n" + upscale("{overlap: 1}") + "---\n" + linear("deep", "a"),
        MODEL,
        ("4 layers", "6"),
    ),
    "a circle": Wrong(
        "name: one\n"
        + upscale("{overlap: 1}", "{model: two}")
        + "---\nname: two\n"
        + upscale("{overlap: 1}", "{model: one}"),
        RECIPE,
        ("one -> two -> one",),
    ),
}
EXPERTS = {
    "none": Wrong(upcycle("{num_experts: 0}"), RECIPE, ("r.yaml:3:27", "is 0")),
    "a million": Wrong(
        upcycle("{num_experts: 1000000}"), RECIPE, ("r.yaml:3:27", "1,000,000", "4,096")
    ),
    "in words": Wrong(
        upcycle("{num_experts: eight}"),
        RECIPE,
        ("r.yaml:3:27", "'eight'"),
    ),
    "half of one": Wrong(upcycle("{num_experts: 2.5}"), RECIPE, ("r.yaml:3:27", "2.5")),
    "top-k of none": Wrong(upcycle("{experts_per_token: 0}"), RECIPE, ("r.yaml:3:33", "is 0")),
    "top-k above them": Wrong(
        upcycle("{num_experts: 4, experts_per_token: 5}"),
        RECIPE,
        ("r.yaml:3:49", "is 5", "4 experts"),
    ),
    "top-k above the models": Wrong(
        upcycle("{experts_per_token: 3}", models="{model: a}, {model: b}"),
        RECIPE,
        ("r.yaml:3:33", "is 3", "2 experts"),
    ),
    "no multiple of the models": Wrong(
        upcycle("{num_experts: 3}", models="{model: a}, {model: b}"), RECIPE, ("is 3", "2 models")
    ),
    "no such router": Wrong(
        upcycle("{num_experts: 4, router: learned}"), RECIPE, ("'learned'", "cheap_embed")
    ),
    "no such layout": Wrong(
        upcycle("{num_experts: 4, architecture: deepseek}"), RECIPE, ("'deepseek'", "mixtral")
    ),
    "the layout of another": Wrong(
        upcycle("{num_experts: 4, architecture: qwen3_moe}"),
        RECIPE,
        ("r.yaml:3:44", "llama", "qwen3_moe"),
    ),
    "no sparse twin": Wrong(
        upcycle("{num_experts: 4}", base="gemma2"),
        RECIPE,
        ("r.yaml:2:13", "gemma2", "no sparse architecture"),
    ),
    "experts already": Wrong(
        upcycle("{num_experts: 4}", base="moe"), RECIPE, ("r.yaml:2:13", "already", "moe_to_dense")
    ),
    "dense layers of a mixtral": Wrong(
        upcycle("{num_experts: 4, sparse_layers: [0, 2]}"), RECIPE, ("r.yaml:3:45", "mixtral")
    ),
    "a layer past the end": Wrong(
        upcycle("{num_experts: 4, sparse_layers: [0, 9]}", base="qwen2"),
        RECIPE,
        ("r.yaml:3:45", "layer 9", "4"),
    ),
    "a negative layer": Wrong(
        upcycle("{num_experts: 4, sparse_layers: [-1]}", base="qwen2"),
        RECIPE,
        ("is -1",),
    ),
    "no layers": Wrong(
        upcycle("{num_experts: 4, sparse_layers: []}", base="qwen2"), RECIPE, ("empty list",)
    ),
    "a layer twice": Wrong(
        upcycle("{num_experts: 4, sparse_layers: [1, 1]}", base="qwen2"),
        RECIPE,
        ("r.yaml:3:45", "1 twice"),
    ),
    "one expert": Wrong(
        upcycle("{num_experts: 1}"), RECIPE, ("r.yaml:3:27", "there is 1 expert\n", "num_experts")
    ),
    "true for a number": Wrong(
        upcycle("{experts_per_token: true}"), RECIPE, ("r.yaml:3:33", "is true", "whole number")
    ),
    "layers in a word": Wrong(
        upcycle("{num_experts: 4, sparse_layers: last}", base="qwen2"),
        RECIPE,
        ("'last'", "even or odd"),
    ),
    "negative noise": Wrong(
        upcycle("{num_experts: 4, noise_scale: -1}"), RECIPE, ("r.yaml:3:43", "is -1")
    ),
    "negative noise of one": Wrong(
        upcycle("{}", models="{model: a, parameters: {noise_scale: -1}}, {model: b}"),
        RECIPE,
        ("r.yaml:4:", "is -1"),
    ),
    "an endless scale": Wrong(
        upcycle("{num_experts: 4, residual_scale: .inf}"),
        RECIPE,
        ("inf",),
    ),
    "another hidden size": Wrong(
        upcycle("{}", models="{model: a}, {model: wide}"),
        MODEL,
        ("experts of different shapes", "wide", "16 x 12", "8 x 12"),
    ),
    "another width": Wrong(
        upcycle("{}", models="{model: a}, {model: wide_mlp}"),
        MODEL,
        ("experts of different shapes", "8 x 20", "8 x 12"),
    ),
    "another depth": Wrong(
        upcycle("{}", models="{model: a}, {model: deep}"), MODEL, ("deep", "6 layers", "4")
    ),
    "another family": Wrong(
        upcycle("{}", models="{model: a}, {model: qwen3}"), MODEL, ("qwen3", "llama")
    ),
    "a hole": Wrong(
        upcycle("{}", models="{model: a}, {model: holey}"), MODEL, ("holey", "layer 2", "up_proj")
    ),
    "no base": Wrong(
        "merge_method: sparse_upcycle\nparameters: {num_experts: 4}\n",
        RECIPE,
        ("r.yaml:1:1",),
    ),
    "no config": Wrong(
        upcycle("{num_experts: 4}", base="bare"), RECIPE, ("bare", "no config.json", "architecture")
    ),
    "biases": Wrong(
        upcycle("{num_experts: 4}", base="biased"), MODEL, ("mlp.down_proj.bias", "mixtral")
    ),
    "windows in some layers": Wrong(
        upcycle("{num_experts: 4}", base="qwen3_window"), RECIPE, ("layer_types", "qwen3_moe")
    ),
    "the mean of two vocabularies": Wrong(
        upcycle("{non_experts: average}", models="{model: a}, {model: words}"),
        MODEL,
        ("[10, 8]", "[14, 8]"),
    ),
    "embeddings without a tokenizer": Wrong(
        upcycle("{router: cheap_embed}", models=PROMPTED), MODEL, ("without a tokenizer",)
    ),
    "hidden states without a tokenizer": Wrong(
        upcycle("{router: hidden}", models=PROMPTED), MODEL, ("without a tokenizer",)
    ),
    "no prompts": Wrong(
        upcycle("{router: cheap_embed}", models="{model: a}, {model: b}"),
        RECIPE,
        ("'a' has no positive_prompts", "'b'"),
    ),
    "prompts of one": Wrong(
        upcycle("{router: hidden}", models="{model: a, positive_prompts: [x]}, {model: b}"),
        RECIPE,
        ("'b' has no positive_prompts",),
    ),
    "a number for a prompt": Wrong(
        upcycle("{router: hidden}", models="{model: a, positive_prompts: [1]}, {model: b}"),
        RECIPE,
        ("is 1", "expected text"),
    ),
    "a text for prompts": Wrong(
        upcycle("{router: hidden}", models="{model: a, positive_prompts: x}, {model: b}"),
        RECIPE,
        ("'x'", "expected a list"),
    ),
    "prompts of another method": Wrong(
        "merge_method: linear\nmodels: [{model: a, positive_prompts: [x]}]\n",
        RECIPE,
        ("positive_prompts", "sparse_upcycle"),
    ),
    "two shared experts": Wrong(
        upcycle("{num_experts: 4}", base="qwen2")
        + "shared_experts: [{model: qwen2}, {model: qwen2}]\n",
        RECIPE,
        ("list of 2", "one"),
    ),
    "misspelt": Wrong(upcycle("{num_expert: 4}"), RECIPE, ("'num_expert'", "'num_experts'")),
    "slices": Wrong(
        f"merge_method: sparse_upcycle\nbase_model: a\nslices: [{{sources: [{A}]}}]\n",
        RECIPE,
        ("no slices",),
    ),
    "a gate of no kind": Wrong(
        moe("gate_mode: magic"), RECIPE, ("r.yaml:2:12", "'magic'", "cheap_embed")
    ),
    "no experts in the list": Wrong(
        moe("gate_mode: random", "[]"),
        RECIPE,
        ("r.yaml:3:10", "at least one expert"),
    ),
    "an expert by another name": Wrong(
        moe("gate_mode: random", "[{model: a}, {source_model: b}]"), RECIPE, ("source_model",)
    ),
    "a layout of the past": Wrong(
        moe("gate_mode: random\narchitecture: deepseek"), RECIPE, ("DeepSeek",)
    ),
}
BACK = {
    "no experts": Wrong(of_one("moe_to_dense", "{}"), MODEL, ("no experts",)),
    "an expert too many": Wrong(
        of_one("moe_to_dense", "{experts: 9}", "moe"),
        RECIPE,
        ("r.yaml:3:23", "names 9", "holds 4", "0 to 3"),
    ),
    "a negative expert": Wrong(
        of_one("moe_to_dense", "{experts: -1}", "moe"),
        RECIPE,
        ("is -1",),
    ),
    "an expert twice": Wrong(
        of_one("moe_to_dense", "{experts: [1, 1]}", "moe"), RECIPE, ("1 twice",)
    ),
    "a shared one that is not": Wrong(
        of_one("moe_to_dense", "{experts: shared}", "moe"),
        RECIPE,
        ("r.yaml:3:23", "no shared expert"),
    ),
    "another class": Wrong(
        of_one("moe_to_dense", "{architecture: qwen2}", "moe"),
        RECIPE,
        ("r.yaml:3:28", "qwen2", "mistral or llama"),
    ),
    "two models": Wrong(
        "merge_method: moe_to_dense\nmodels: [{model: moe}, {model: moe3}]\n",
        RECIPE,
        ("takes one model", "2"),
    ),
    "no reference": Wrong(of_one("match_experts", "{}", "moe"), RECIPE, ("base_model",)),
    "another number": Wrong(
        of_one("match_experts", "{}", "moe3", "base_model: moe\n"), MODEL, ("3 experts", "4")
    ),
    "a dense model": Wrong(
        of_one("match_experts", "{}", "a", "base_model: moe\n"), MODEL, ("no experts",)
    ),
    "by what": Wrong(
        of_one("match_experts", "{by: names}", "moe", "base_model: moe3\n"),
        RECIPE,
        ("'names'", "router"),
    ),
    "the mean of other numbers": Wrong(
        linear("moe", "moe3"), MODEL, ("lacks 12 tensors", "experts.3")
    ),
}
WIDTHS = {
    "a digit too many": Wrong(
        of_one("pad", "{hidden_size: 1000000000000000}"),
        RECIPE,
        ("r.yaml:3:27", "1,000,000,000,000,000", "at most 16,777,216"),
    ),
    "a basis of no kind": Wrong(
        of_one("project", "{basis: pca}"), MODEL, ("r.yaml:3:21", "'pca'", "basis is svd, or")
    ),
    "no size": Wrong(of_one("pad", "{}"), RECIPE, ("no size",)),
    "narrower": Wrong(
        of_one("pad", "{hidden_size: 4}"), RECIPE, ("r.yaml:3:27", "is 4", "8", "crop")
    ),
    "wider": Wrong(
        of_one("crop", "{intermediate_size: 100}"), RECIPE, ("r.yaml:3:33", "is 100", "12", "pad")
    ),
    "nothing": Wrong(of_one("crop", "{hidden_size: 0}"), RECIPE, ("is 0", "at least 1")),
    "a word": Wrong(of_one("pad", "{hidden_size: wide}"), RECIPE, ("'wide'",)),
    "a part": Wrong(of_one("pad", "{intermediate_size: 20.5}"), RECIPE, ("20.5",)),
    "no whole groups": Wrong(
        of_one("pad", "{num_attention_heads: 3, num_key_value_heads: 2}"),
        RECIPE,
        ("3 attention heads", "2"),
    ),
    "misspelt": Wrong(of_one("pad", "{hiden_size: 16}"), RECIPE, ("'hiden_size'", "'hidden_size'")),
    "no basis": Wrong(
        of_one("project", "{hidden_size: 4, basis: nowhere.safetensors}"),
        MODEL,
        ("'nowhere.safetensors'",),
    ),
    "a basis among others": Wrong(
        of_one("project", "{hidden_size: 4, basis: a/model.safetensors}"),
        MODEL,
        ("39 tensors", "FILE:TENSOR"),
    ),
    "two models": Wrong(
        "merge_method: pad\nmodels: [{model: a}, {model: b}]\nparameters: {hidden_size: 16}\n",
        RECIPE,
        ("found 2",),
    ),
    "no config": Wrong(
        of_one("pad", "{hidden_size: 16}", "bare"), RECIPE, ("bare", "no config.json")
    ),
    "the mean of other widths": Wrong(linear("a", "wide"), MODEL, ("[10, 8]", "[10, 16]")),
}
GROUPS = {"stack": STACKS, "depth": DEPTHS, "experts": EXPERTS, "back": BACK, "width": WIDTHS}
CASES = {
    f"{group}, {name}": case for group, cases in GROUPS.items() for name, case in cases.items()
}

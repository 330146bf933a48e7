"""What stands in repositories of the hub, and what of it a run needs."""

from __future__ import annotations

__all__ = ["CODE", "NEEDED", "UNNEEDED"]

_FAST = "config.json generation_config.json tokenizer.json tokenizer_config.json README.md"
_MAPS = "added_tokens.json special_tokens_map.json"


def _sharded(count: int, name: str = "model") -> str:
    shards = (f"{name}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1))
    return " ".join([f"{name}.safetensors.index.json", *shards])


def _tree(files: dict[str, str]) -> dict[str, list[str]]:
    return {repository: names.split() for repository, names in files.items()}


NEEDED = _tree(
    {
        "llama-3": f"{_FAST} special_tokens_map.json LICENSE USE_POLICY.md {_sharded(4)}",
        "llama-2": f"{_FAST} {_MAPS} tokenizer.model LICENSE.txt USE_POLICY.md NOTICE {_sharded(2)}",
        "mistral": f"{_FAST} {_MAPS} tokenizer.model tokenizer.model.v3 {_sharded(3)}",
        "mistral-nemo": f"{_FAST} tekken.json chat_template.jinja chat_template.json {_sharded(5)}",
        "phi-3": f"{_FAST} {_MAPS} tokenizer.model LICENSE NOTICE.md {_sharded(2)}",
        "qwen": f"config.json generation_config.json tokenizer_config.json qwen.tiktoken LICENSE NOTICE {_sharded(8)}",
        "qwen-2.5": f"{_FAST} vocab.json merges.txt LICENSE model.safetensors",
        "gemma-3": f"{_FAST} {_MAPS} tokenizer.model chat_template.jinja preprocessor_config.json processor_config.json"
        f" video_preprocessor_config.json {_sharded(2)}",
        "gpt-2": f"{_FAST} vocab.json merges.txt model.safetensors",
        "roberta": "config.json vocab.bpe vocab.txt sentencepiece.bpe.model model.safetensors",
        "command-r": f"{_FAST} chat_template.jinja additional_chat_templates/tool_use.jinja"
        f" additional_chat_templates/rag.jinja {_sharded(3)}",
        "both": f"{_FAST} model.safetensors model.safetensors.index.json",
    }
)
"""Files by repository that are fetched, code apart."""

CODE = _tree(
    {
        "phi-3": "configuration_phi3.py modeling_phi3.py sample_finetune.py",
        "qwen": "configuration_qwen.py modeling_qwen.py tokenization_qwen.py qwen_generation_utils.py",
    }
)
"""Files that are fetched where the repository's code is trusted."""

UNNEEDED = _tree(
    {
        "llama-3": ".gitattributes original/consolidated.00.pth original/params.json original/tokenizer.model",
        "llama-2": "pytorch_model-00001-of-00001.bin pytorch_model.bin.index.json Responsible-Use-Guide.pdf",
        "mistral": "consolidated.safetensors params.json",
        "mistral-nemo": f"consolidated.safetensors params.json {_sharded(2, 'consolidated')}",
        "phi-3": "CODE_OF_CONDUCT.md data_summary_card.md SECURITY.md cpu-int4/model.onnx cpu-int4/config.json",
        "qwen": "assets/logo.jpg cache_autogptq_cuda_256.cpp examples/react_prompt.md examples/run.py",
        "qwen-2.5": "mlx/model.safetensors mlx/config.json qwen2.5-q4_k_m.gguf gguf/tokenizer.model",
        "gemma-3": "gemma-3.gguf adapter/adapter_model.safetensors adapter/tokenizer.json added/a.model",
        "gpt-2": "64.tflite flax_model.msgpack onnx/config.json onnx/merges.txt onnx/decoder_model.onnx"
        " pytorch_model.bin tf_model.h5 model.fp16.safetensors coreml/model.mlpackage/Manifest.json",
        "roberta": "dict.txt training_args.bin optimizer.pt trainer_state.json runs/events.out",
        "command-r": "additional/README.md additional_chat_templates_old/x.jinja a/LICENSE additional_chat/x.model",
        "both": "model-00001-of-00002.safetensors model-00002-of-00002.safetensors adapter_model.safetensors"
        f" adapter_config.json {_sharded(2, 'model.fp16')}",
    }
)
"""Files that stand there too."""

"""Write a training checkpoint as a Hugging Face Llama directory: config, generation config, bf16 safetensors.

python -m models.training.export --checkpoint runs/millpond/last.pt --out models/millpond
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from models.training.network import Shape

BOS, END, PAD = 0, 1, 2  # the order of tokenizer.SPECIAL


def config_of(shape: Shape) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
        "torch_dtype": "bfloat16",
    }


def write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    state = torch.load(arguments.checkpoint, weights_only=True)
    tensors = {f"model.{name}": tensor.to(torch.bfloat16).contiguous() for name, tensor in state["model"].items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.out / "model.safetensors", metadata={"format": "pt"})
    (arguments.out / "model.safetensors").chmod(0o644)
    write_json(arguments.out / "config.json", config_of(Shape(**state["shape"])))
    generation: dict[str, object] = {"bos_token_id": BOS, "eos_token_id": END, "pad_token_id": PAD, "do_sample": False}
    write_json(arguments.out / "generation_config.json", generation)
    parameters = sum(tensor.numel() for tensor in tensors.values())
    size = (arguments.out / "model.safetensors").stat().st_size
    print(f"step {state['step']}: {parameters:,} parameters, {size:,} bytes")


if __name__ == "__main__":
    main()

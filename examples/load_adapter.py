"""Load a trained language-model adapter elsewhere. None of this needs fish-tuning."""

import argparse
import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("adapter", nargs="?", default="output/sft", help="written by sft.py")
parser.add_argument("--model", help="the base model; by default the one that the adapter names")
parser.add_argument("--merged", default="output/merged", help="where to save the merged model")
parser.add_argument("--max-lora-rank", type=int, default=16, help="of the inference server")
args = parser.parse_args()

config = json.loads(Path(args.adapter, "adapter_config.json").read_text(encoding="utf-8"))
name = args.model or config["base_model_name_or_path"]

# 1. With PEFT: the adapter can be switched on and off.
tokenizer = AutoTokenizer.from_pretrained(args.adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(name), args.adapter)
prompt = tokenizer.apply_chat_template(
    [{"role": "user", "content": "What is a river?"}],
    add_generation_prompt=True,
    return_tensors="pt",
    return_dict=True,
)
with torch.inference_mode():
    text = model.generate(**prompt, max_new_tokens=32, do_sample=False)
print(tokenizer.decode(text[0], skip_special_tokens=True))

# 2. Merged: an ordinary model, for anything that reads transformers models.
model.merge_and_unload().save_pretrained(args.merged)
tokenizer.save_pretrained(args.merged)

# 3. In an inference server that loads LoRA adapters itself. These are the parts of an adapter's
#    config that vLLM refuses or does not read; serve the merged model if there is one of them.
obstacles = {
    "it is not a LoRA": config["peft_type"] != "LORA",
    "it trains modules in full (modules_to_save)": bool(config.get("modules_to_save")),
    "it is a DoRA": bool(config.get("use_dora")),
    "it trains biases": config.get("bias", "none") != "none",
    "its rank is above the server's --max-lora-rank": config.get("r", 0) > args.max_lora_rank,
    "its ranks differ by module": bool(config.get("rank_pattern") or config.get("alpha_pattern")),
}
found = [obstacle for obstacle, there in obstacles.items() if there]
if found:
    print(f"Serve the merged model: vllm serve {args.merged}  (the adapter: {'; '.join(found)})")
else:
    print(
        f"vllm serve {name} --enable-lora --max-lora-rank {args.max_lora_rank} "
        f"--lora-modules mine={args.adapter}"
    )

"""How millpond, the model shipped with Millrace, is made: text, tokenizer, network, training, golden set."""

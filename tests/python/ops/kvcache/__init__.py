"""`attention_with_kvcache`: every form of a cache, appending, rotary embedding, pieces, hidden garbage."""

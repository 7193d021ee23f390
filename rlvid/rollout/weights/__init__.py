"""How the trainer's weights reach the engines. This is the whole contract; the modules here are its three ways.

The trainer's side is `Learner.weight_parts`: it yields named tensors in parts, each under the name that the engine
knows (the checkpoint's names; with LoRA the adapters alone, under those of an adapter file).

- **Order.** All ranks iterate the same parts in the same order. Under ZeRO-3 each part is gathered by all ranks, so
  ranks that iterate differently, or one that stops early, wait for each other forever. Without ZeRO-3 the other ranks
  need not iterate.
- **Buffers.** The trainer owns the tensors of a part. They are valid until the next part is taken, and until the next
  training step: who keeps them copies them. A bucket in shared memory belongs to the trainer and is valid until the
  next version is written; the trainer writes it only when no engine reads the previous one.
- **Versions.** A version counts up. An engine generates nothing between the first and the last part of a version,
  drops what it cached with the old weights, and ignores versions that are not newer than its own.
- **Checksums.** After its start or restart an engine's first weights come with a digest per bucket, compared before
  they are loaded. `nccl` and `ipc` compare names, dtypes and shapes, and vLLM raises where they differ.
- **Completeness.** A parameter that did not arrive is an error: vLLM would serve its old values.
- **Deadlines.** Each call has `deadlines.sync_s`. A replica that fails or exceeds it is replaced, never served.

The ways (`rollout.weight_transfer`):

- `buckets`: flat buckets of bytes (`buckets`), through Ray's object store or, where trainer and engines are on one
  machine, memory that they share (`shared_memory`). The engine loads one while the trainer writes the next
  (`bucket_engine`). Any device; the only way for adapters.
- `nccl`: vLLM's own, between GPUs (`gpu_sender`).
- `ipc`: vLLM's own, between processes on one GPU (`gpu_sender`).
"""

"""A batch of a language model cut along its sequence."""
import torch
import torch.distributed as dist

from dattn import _c
from dattn.torch import _mesh, sharding

IGNORED = -100  # a label that has no part in the loss
ALONG_SEQUENCE = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "labels", "shift_labels")


def shard_batch(batch, mesh, layout="zigzag", *, shift_labels=True, timeout_s=None):
    """This rank's part of a batch that is equal on all ranks of the sequence: a dict for model(**..).

    input_ids, inputs_embeds, token_type_ids, position_ids (made if absent): this rank's rows, [batch, rows]
    labels: with shift_labels (causal models) those of the next position, shifted before they are cut, since the next position
        may lie on another rank; also given as `shift_labels`, which models then take as they are
    attention_mask: stays whole, [batch, seq]: it says how long the sequence is, and which keys are padding
    num_items_in_batch: labels of the whole batch, of all data ranks, that count. model(**batch).loss is then this rank's part
        of the loss: the loss, and its gradients, are sums over the ranks
    cu_seq_lens_q, cu_seq_lens_k: where position_ids begin anew in a batch of one row (packed documents)
    Everything else passes as it is. Nothing is sent, but the number of items where the mesh has a dimension `data`."""
    spec = _mesh.spec_of(mesh, timeout_s=timeout_s)
    batch = dict(batch)
    first = batch.get("input_ids", batch.get("inputs_embeds"))
    if first is None:
        raise _c.BadInput(f"the batch has {', '.join(batch) or 'nothing'}; shard_batch needs input_ids or inputs_embeds")
    rows, seq, ranks = first.shape[0], first.shape[1], spec.sequence_ranks
    if seq < 2 * ranks:
        raise _c.BadInput(f"the batch has {seq} positions for {ranks} ranks along the sequence; give at least {2 * ranks}")
    if batch.get("shift_labels") is not None:
        batch["labels"] = batch["shift_labels"]
    elif batch.get("labels") is not None and shift_labels:
        batch["shift_labels"] = batch["labels"] = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[..., 1:]
    if batch.get("position_ids") is None:
        batch["position_ids"] = torch.arange(seq, device=first.device)[None]
    elif batch.get("attention_mask") is None and batch.get("cu_seq_lens_q") is None and ranks > 1:
        _find_documents(batch, rows, seq)
    if batch.get("attention_mask") is None:
        batch["attention_mask"] = torch.ones(rows, seq, dtype=torch.bool, device=first.device)
    elif tuple(batch["attention_mask"].shape) != (rows, seq):
        raise _c.BadInput(f"attention_mask has shape {list(batch['attention_mask'].shape)}; give [{rows}, {seq}], as input_ids has")
    if batch.get("labels") is not None and "num_items_in_batch" not in batch:
        batch["num_items_in_batch"] = _over_data_ranks(mesh, batch["labels"].ne(IGNORED).sum())
    for name in ALONG_SEQUENCE:
        if batch.get(name) is not None:
            batch[name] = sharding.shard(batch[name], spec, layout, dim=1).contiguous()
    return batch


def _find_documents(batch, rows, seq):
    """Packed documents, by positions that do not go on by one, as the flash attention of transformers wants them told."""
    positions = batch["position_ids"]
    breaks = positions.diff(dim=-1) != 1
    if not bool(breaks.any()):
        return
    if rows != 1:
        raise _c.BadInput(f"position_ids begin anew inside a batch of {rows} rows; pack documents into a batch of one row")
    begins = (breaks[0].nonzero()[:, 0] + 1).tolist()
    lengths = torch.tensor([0, *begins, seq], dtype=torch.int32, device=positions.device)
    batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = lengths


def _over_data_ranks(mesh, count):
    if isinstance(mesh, dist.DeviceMesh) and "data" in mesh.mesh_dim_names and mesh.size(mesh.mesh_dim_names.index("data")) > 1:
        dist.all_reduce(count, group=mesh.get_group("data"))
    return count

"""dattn for Megatron-Core: a core attention for layer specs, sharded over tensor and context parallel ranks.

    spec = get_gpt_layer_local_spec()       # or get_gpt_layer_with_transformer_engine_spec()
    spec.submodules.self_attention.submodules.core_attention = dattn.megatron.CoreAttention

Its data layout is Megatron's: of 2 * CP chunks of the sequence, rank r holds chunks r and 2 * CP - 1 - r (layout zigzag), so
get_batch_on_this_cp_rank goes on to cut the batch; of packed documents each one is cut so. docs/plugins.md describes all of
it."""
import re
import weakref

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from dattn import _c
from dattn.torch import _masks, _mesh, sharding
from dattn.torch._attention import attention

__all__ = ["CoreAttention"]

# cp_comm_type -> (strategy, axis of the context parallel ranks); then our strategies, by name
COMM_TYPES = {"p2p": ("ring", "ring"), "a2a": ("ulysses", "ulysses"), "all_gather": ("allgather", "ring"),
              **{name: (name, "ring") for name in ("auto", "ring", "ring_q", "allgather", "fetch", "halo")},
              "ulysses": ("ulysses", "ulysses"), **{name: (name, "rows") for name in ("grid", "grid_gather", "tree")}}
WITH_AXES = re.compile(r"(\w+)\((\w+=\d+(?:, *\w+=\d+)*)\)")  # "grid(ring=4, rows=2)"
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


class CoreAttention(MegatronModule):
    """The arguments are those that Megatron gives to a core attention.

    cp_comm_type: "p2p" (a ring, the default), "a2a" (heads for positions), "all_gather", "a2a+p2p" (the first of
        hierarchical_context_parallel_sizes is the all-to-all's); or a strategy of ours: "ring_q", "tree", "auto", ..; or one with
        its axes, slowest first: "grid(ring=4, rows=2)".
    pg_collection: its groups tp, cp, hcp (for a2a+p2p) and, for dropout, dp; or those of parallel_state."""

    def __init__(self, config, layer_number, attn_mask_type, attention_type, attention_dropout=None, softmax_scale=None,
                 k_channels=None, v_channels=None, cp_comm_type=None, pg_collection=None, **_):
        super().__init__(config=config)
        if config.qk_clip or getattr(config, "log_max_attention_logit", False):
            raise _c.BadInput("qk_clip and log_max_attention_logit need the greatest score, which is not kept; turn them off")
        self.layer_number, self.attn_mask_type = max(1, layer_number), attn_mask_type
        self.groups = pg_collection
        if pg_collection is None:
            wanted = ["tp", "cp"] + (["hcp"] if cp_comm_type == "a2a+p2p" else [])
            self.groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=wanted)
        self.cp_comm_type = cp_comm_type or "p2p"
        self.softmax_scale = softmax_scale
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = tuple(None if side < 0 else side for side in config.window_size) if windowed else None
        self._make_sink(config)
        self._specs = {}  # (strategy, MeshSpec) by context parallel group
        self._places(self.groups.cp if config.context_parallel_size > 1 else None)  # refuses what it must refuse now

    def _make_sink(self, config):
        if config.softmax_type == "vanilla":
            self.softmax_offset = None
            return
        heads = config.num_attention_heads // self.groups.tp.size()
        device = "cpu" if config.use_cpu_initialization or not torch.cuda.is_available() else torch.cuda.current_device()
        offset = torch.zeros(heads, device=device, dtype=config.params_dtype)
        if config.softmax_type == "off-by-one":
            self.register_buffer("softmax_offset", offset, persistent=False)
        elif config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(offset)
            if config.perform_initialization:
                config.init_method(self.softmax_offset)
        else:
            raise _c.BadInput(f"softmax_type is '{config.softmax_type}'; known: vanilla, off-by-one, learnable")

    def forward(self, query, key, value, attention_mask=None, attn_mask_type=None, attention_bias=None, packed_seq_params=None, **_):
        """query [seq / CP, batch, heads / TP, dim] -> [seq / CP, batch, heads / TP * dim]; packed (thd): query [tokens / CP,
        heads / TP, dim]. attention_mask: True = hidden, as Megatron's are; of types padding, padding_causal and arbitrary,
        [batch or 1, 1, 1 or rows, whole seq]; else it is not read. attention_bias: [batch or 1, heads or 1, rows, whole seq]."""
        kind = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        group = self.groups.cp if self.config.context_parallel_size > 1 else None
        form = "sbhd"
        if packed_seq_params is not None:
            form = packed_seq_params.qkv_format or form
            if packed_seq_params.cp_group is not None:
                group = packed_seq_params.cp_group
            elif packed_seq_params.local_cp_size is not None:
                group = None
        strategy, spec = self._places(group)
        call = {"mesh": spec, "strategy": strategy, "scale": self.softmax_scale, "sink": self.softmax_offset,
                "dropout_p": self.dropout if self.training else 0.0}
        if form == "thd":
            if attention_bias is not None:
                raise _c.BadInput("attention_bias came with packed sequences (thd); it is available for sbhd and bshd")
            out = self._packed(query, key, value, kind, packed_seq_params, spec, call)
            return out.reshape(out.shape[0], -1)
        axis = 0 if form == "sbhd" else 1
        lengths = [tensor.shape[axis] * spec.sequence_ranks for tensor in (query, key)]
        band = self._band(kind, lengths[0])
        if attention_mask is not None and kind not in (AttnMaskType.causal, AttnMaskType.causal_bottom_right, AttnMaskType.no_mask):
            band = _with_tensor(band, attention_mask, spec, *lengths)
        elif kind == AttnMaskType.arbitrary:
            raise _c.BadInput("attn_mask_type is arbitrary, but there is no attention_mask")
        out = attention(query, key, value, mask=band, bias=attention_bias, tensor_format=form, seq_len=lengths[0],
                        seq_len_kv=lengths[1], **call)
        return out.flatten(2)

    # ---- where ranks are ----

    def _places(self, group):
        """(strategy, MeshSpec) of the ranks of a context parallel group (None = one rank) and of the tensor parallel group."""
        found = self._specs.get(group)
        if found is None:
            found = self._specs[group] = self._find_places(group)
        return found

    def _find_places(self, group):
        strategy, axes = "auto", ()
        if group is not None and group.size() > 1:
            strategy, axes = self._axes(group.size())
        across = self.groups.tp
        axes += (("tensor", across.size()),)
        sequence = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        tensor = dist.get_process_group_ranks(across)
        if len(sequence) == 1 or len(tensor) == 1:
            carrier, ranks = (across, None) if len(sequence) == 1 else (group, None)
        else:  # this rank's row and column of a grid of ranks
            own = dist.get_rank()
            carrier, ranks = dist.group.WORLD, tuple(along + beside - own for along in sequence for beside in tensor)
        return strategy, _mesh._finish(carrier, ranks, axes, self._data_index(), None)

    def _axes(self, ranks):
        """(strategy, ((axis, ranks), ..)) of cp_comm_type."""
        word = self.cp_comm_type
        if word == "a2a+p2p":
            inner = self.groups.hcp[0].size()
            return "hybrid", (("ring", ranks // inner), ("ulysses", inner))
        if word in COMM_TYPES:
            strategy, axis = COMM_TYPES[word]
            return strategy, ((axis, ranks),)
        match = WITH_AXES.fullmatch(word)
        if match is None:
            raise _c.BadInput(f"cp_comm_type is '{word}'; known: {', '.join([*COMM_TYPES, 'a2a+p2p'])}, or a strategy with its axes,"
                              " such as grid(ring=4, rows=2)")
        axes = tuple((axis.strip(), int(size)) for axis, size in (pair.split("=") for pair in match[2].split(",")))
        names, product = [axis for axis, _ in axes], 1
        for _, size in axes:
            product *= size
        if names != [axis for axis in _mesh.SEQUENCE_AXES if axis in names]:
            raise _c.BadInput(f"cp_comm_type is '{word}'; axes go {', '.join(_mesh.SEQUENCE_AXES)}, slowest first")
        if product != ranks:
            raise _c.BadInput(f"cp_comm_type is '{word}', which has {product} ranks, but the context parallel group has {ranks}")
        return match[1], axes

    def _data_index(self):
        """Which batch rows this rank has: dropout is keyed by their number."""
        if hasattr(self.groups, "dp"):
            return self.groups.dp.rank()
        return parallel_state.get_data_parallel_rank() if parallel_state.is_initialized() else 0

    # ---- who sees whom ----

    def _band(self, kind, queries):
        """The mask of a type and the layer's window, without tensors."""
        if kind in CAUSAL:
            return "causal" if self.window is None else {"kind": "window", "left": self.window[0], "right": 0}
        at_end = kind == AttnMaskType.causal_bottom_right or (kind == AttnMaskType.no_mask and queries == 1)
        if kind == AttnMaskType.causal_bottom_right and self.window is None:
            return "causal_bottom_right"
        if self.window is None:
            return "full"
        if at_end:  # one query while decoding is the last position
            return {"kind": "window", "left": self.window[0], "right": 0, "align": "end"}
        return {"kind": "window", "left": self.window[0], "right": self.window[1]}

    def _packed(self, query, key, value, kind, packed, spec, call):
        """Documents behind each other, [tokens, heads, dim]; those of one length are attended together."""
        band = self._band(kind, 0)
        groups = _document_groups(packed, spec.sequence_ranks)
        orders, outs = [], []
        for (queries, keys), documents in groups.items():
            rows = torch.cat([torch.arange(document.row, document.row + queries // spec.sequence_ranks) for document in documents])
            key_rows = torch.cat([torch.arange(document.key_row, document.key_row + keys // spec.sequence_ranks)
                                  for document in documents])
            take = lambda tensor, at: tensor.index_select(0, at.to(tensor.device)).unflatten(0, (len(documents), -1))
            mask = _of_documents(band, documents, queries, keys)
            out = attention(take(query, rows), take(key, key_rows), take(value, key_rows), mask=mask, tensor_format="bshd",
                            seq_len=queries, seq_len_kv=keys, **call)
            orders.append(rows)
            outs.append(out.flatten(0, 1))
        order = torch.cat(orders)
        if order.numel() != query.shape[0]:
            raise _c.BadInput(f"packed_seq_params describe {order.numel()} tokens of this rank, but query has {query.shape[0]}")
        return torch.cat(outs).index_select(0, order.argsort().to(query.device))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """The learnable offsets of the softmax, cut over the tensor parallel ranks."""
        state = self.state_dict(prefix="", keep_vars=True) if self.config.softmax_type == "learnable" else {}
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets, tp_group=self.groups.tp,
                                                   dp_cp_group=metadata["dp_cp_group"])


# ---- masks given as tensors ----

_recognised = {}  # (id of a mask tensor, band) -> (weak reference, version, mask): layers share one tensor


def _with_tensor(band, hidden, spec, queries, keys):
    """A band without the pairs that a tensor hides."""
    if isinstance(hidden, tuple):
        raise _c.BadInput("attention_mask is a pair of masks, for queries and keys; give one for both, [batch, 1, rows, keys]")
    key = (id(hidden), str(band))
    known = _recognised.get(key)
    if known is not None and known[0]() is hidden and known[1] == hidden._version:
        return known[2]
    rows = queries // spec.sequence_ranks
    if hidden.dim() != 4 or hidden.shape[-1] != keys or hidden.shape[-2] not in (1, rows):
        raise _c.BadInput(f"attention_mask has shape {list(hidden.shape)}; give [batch or 1, 1, 1 or {rows}, {keys}]: this rank's"
                          " rows, the whole sequence's keys")
    seen = ~hidden
    if hidden.shape[-2] == rows and spec.sequence_ranks > 1:
        seen = sharding.unshard(seen, spec, "zigzag", dim=2, seq_len=queries)
    mask = _masks.mask_of(seen.expand(-1, -1, queries, -1) & _shown(band, queries, keys).to(seen.device))
    _recognised[key] = (weakref.ref(hidden, lambda _: _recognised.pop(key, None)), hidden._version, mask)
    return mask


def _shown(band, queries, keys):
    """[queries, keys] booleans of a band."""
    distance = torch.arange(keys)[None] - torch.arange(queries)[:, None]
    if band == "full":
        return distance == distance
    if band == "causal":
        return distance <= 0
    left, right = band["left"], band["right"]
    return (distance >= (-queries if left is None else -left)) & (distance <= (keys if right is None else right))


# ---- packed documents ----


class Document:
    """One of a packed sequence: where its rows begin on this rank, and how many of its positions are no padding."""

    def __init__(self, row, key_row, queries, keys):
        self.row, self.key_row, self.queries, self.keys = row, key_row, queries, keys


_grouped = [None, None, None]  # the last PackedSeqParams (weak), ranks, result: layers share them


def _document_groups(packed, ranks):
    """(queries, keys), padding included, -> documents of these lengths."""
    if _grouped[0] is not None and _grouped[0]() is packed and _grouped[1] == ranks:
        return _grouped[2]
    if packed.cu_seqlens_q is None:
        raise _c.BadInput("packed_seq_params have qkv_format thd, but no cu_seqlens_q")
    ends = packed.cu_seqlens_q.tolist()
    key_ends = ends if packed.cu_seqlens_kv is None else packed.cu_seqlens_kv.tolist()
    padded = ends if packed.cu_seqlens_q_padded is None else packed.cu_seqlens_q_padded.tolist()
    key_padded = (padded if packed.cu_seqlens_kv is None else key_ends) if packed.cu_seqlens_kv_padded is None else (
        packed.cu_seqlens_kv_padded.tolist())
    groups = {}
    for at in range(len(ends) - 1):
        lengths = padded[at + 1] - padded[at], key_padded[at + 1] - key_padded[at]
        if ranks > 1 and (lengths[0] % (2 * ranks) or lengths[1] % (2 * ranks)):
            raise _c.BadInput(f"packed document {at} has {lengths[0]} positions and {lengths[1]} keys; over {ranks} context parallel"
                              f" ranks, pad documents to multiples of {2 * ranks} (cu_seqlens_q_padded)")
        if lengths[0] > 0:
            document = Document(padded[at] // ranks, key_padded[at] // ranks, ends[at + 1] - ends[at], key_ends[at + 1] - key_ends[at])
            groups.setdefault(lengths, []).append(document)
    _grouped[:] = weakref.ref(packed), ranks, groups
    return groups


def _of_documents(band, documents, queries, keys):
    """The mask of a batch of documents: a band, in which nothing sees a document's padding."""
    if band == "causal" and queries == keys or all(document.keys == keys for document in documents):
        return band  # a causal query that is no padding sees none
    if band == "causal_bottom_right" or "align" in band:
        raise _c.BadInput("attn_mask_type is causal_bottom_right, and packed documents have padding; pack them without")
    lo, hi = {"full": (None, None), "causal": (None, 0)}[band] if isinstance(band, str) else (
        None if band["left"] is None else -band["left"], band["right"])
    masks = [{"kind": "regions", "regions": [{"q": [0, queries], "k": [0, document.keys], "lo": lo, "hi": hi}]}
             for document in documents]
    return masks[0] if len(masks) == 1 else {"kind": "per_row", "masks": masks}

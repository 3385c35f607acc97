"""transformers.Trainer with the sequence of every batch cut over a mesh."""
import torch.distributed as dist

from dattn import _c
from dattn.torch import _mesh
from dattn.transformers._batches import shard_batch


class ShardedTrainer:
    """To be put before a Trainer: class MyTrainer(dattn.transformers.ShardedTrainer, Trainer); or ShardedTrainer.of(Trainer).

    MyTrainer(.., mesh=mesh, layout="zigzag"): the ranks of the mesh's sequence dimensions get the same samples, in shards; those
    of its dimension `data`, others. per_device_train_batch_size counts the samples of one data rank. The loss is that of one
    process with the same samples: Trainer divides by the tokens of all ranks (average_tokens_across_devices)."""

    @staticmethod
    def of(trainer):
        return type(f"Sharded{trainer.__name__}", (ShardedTrainer, trainer), {})

    def __init__(self, *args, mesh=None, layout="zigzag", **options):
        super().__init__(*args, **options)
        self.sharding = (mesh, layout)
        spec = _mesh.spec_of(mesh)
        self.data_ranks, self.data_index = _data_coordinate(mesh, spec)
        if self.data_ranks * spec.sequence_ranks != self.args.world_size:
            raise _c.BadInput(f"the mesh has {self.data_ranks} data x {spec.sequence_ranks} sequence ranks, but Trainer runs on"
                              f" {self.args.world_size}; it needs a mesh of these two kinds of dimensions over all ranks")
        if spec.sequence_ranks > 1 and not (self.model_accepts_loss_kwargs and self.args.average_tokens_across_devices):
            raise _c.BadInput("ranks have different numbers of labels: the loss must be divided by those of all of them, but"
                              f" {type(self.model).__name__} takes no num_items_in_batch, or average_tokens_across_devices is off")

    def get_train_dataloader(self):
        return self._for_data_ranks(super().get_train_dataloader())

    def get_eval_dataloader(self, eval_dataset=None):
        return self._for_data_ranks(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        return super().get_batch_samples(map(self._shard, epoch_iterator), num_batches, device)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        if not prediction_loss_only and _mesh.spec_of(self.sharding[0]).sequence_ranks > 1:
            raise _c.BadInput("predictions of sharded sequences are not gathered; set prediction_loss_only=True, without"
                              " compute_metrics")
        return super().prediction_step(model, self._shard(inputs), prediction_loss_only, ignore_keys)

    def _shard(self, batch):
        mesh, layout = self.sharding
        batch = shard_batch(batch, mesh, layout, shift_labels=getattr(self, "_loss_shifts_labels", True))
        batch.pop("num_items_in_batch", None)  # Trainer counts, over accumulated batches
        return batch

    def _for_data_ranks(self, loader):
        """accelerate deals batches to all ranks; here, to data ranks."""
        for dealer in (getattr(loader, "batch_sampler", None), getattr(loader, "dataset", None)):
            if hasattr(dealer, "num_processes") and hasattr(dealer, "process_index"):
                dealer.num_processes, dealer.process_index = self.data_ranks, self.data_index
                return loader
        if self.args.world_size > 1:
            raise _c.BadInput(f"{type(loader).__name__} deals batches in a way that is not known here; use accelerator_config"
                              " dispatch_batches=False")
        return loader


def _data_coordinate(mesh, spec):
    if isinstance(mesh, dist.DeviceMesh) and "data" in mesh.mesh_dim_names:
        return mesh.size(mesh.mesh_dim_names.index("data")), spec.data_index
    return 1, 0

"""open_clip's own trainer on our shards, with one of our losses: all of its options, and --loss NAME.

    python examples/open_clip_trainer.py --loss neuclip --model ViT-B-32 --train-data 'shards/{00000..00012}.tar' \
        --train-num-samples 12321 --dataset-type webdataset --batch-size 256 --epochs 5

Losses that keep something for every pair (fastclip-v3, ...) need its index, which open_clip's loader does not give.
Its checkpoints have no place for a loss: with --resume the NPN or the queue begins anew, as at step 0.
Needs: pip install 'neuclip-scale[open-clip-trainer]'.
"""

import argparse
import functools

import open_clip
import open_clip_train.data
import open_clip_train.main as trainer

from neuclip_scale import create_loss

# webdataset 1.0 marks the end of a shard by a sample without a name, which open_clip's reader stumbles over.
without_marks = functools.partial(open_clip_train.data.tar_file_expander, eof_value=None)


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--loss", default="neuclip", choices=["neuclip", "neuclip-queue", "openclip", "rgcl-g"])
    options, rest = parser.parse_known_args()

    def our_loss(args: argparse.Namespace) -> object:
        if args.accum_freq > 1 and options.loss != "openclip":  # it is called with the whole batch for each part
            parser.error("--accum-freq: a loss that learns would learn of each batch several times. Leave it out.")
        embed_dim = open_clip.get_model_config(args.model)["embed_dim"]
        return create_loss(options.loss, embed_dim=embed_dim, global_batch_size=args.batch_size * args.world_size)

    trainer.create_loss, open_clip_train.data.tar_file_expander = our_loss, without_marks
    trainer.main(rest)


if __name__ == "__main__":
    main()

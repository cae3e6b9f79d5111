"""Mixtures of experts in a small LLaMA: parameters, training, balance.

    python tools/studies/llama_moe.py count
    python tools/studies/run.py llama_moe

`count` builds the LLaMA-1B of ParameterNet's paper on the meta device, which
takes no memory, and compares its parameters with the published ones. The study
trains test-sized models, letter by letter, on the text of Python's own manual
(the module pydoc_data.topics, which comes with Python) with plain Hugging
Face code. Needs transformers.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from study import Run, Study

from lors_plugin.language import add_experts, auxiliary_loss, expert_load

# What the paper prints, in units of 10^9.
PUBLISHED = {None: 0.94, 4: 1.54, 8: 2.35}
LLAMA_1B = dict(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=12,
    num_attention_heads=16,
)
SMALL = dict(
    vocab_size=256,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)
STEPS, BATCH, LR, WARMUP = 300, 16, 2e-3, 20


def command(run: Run, seed: int, quick: bool) -> list[str]:
    """Return script and arguments of a training, see :class:`Study`."""
    options = {**run.options, 'seed': seed, 'steps': 3 if quick else STEPS}
    words = [f'--{key}={value}' for key, value in options.items()]
    return ['tools/studies/llama_moe.py', 'train', *words]


STUDY = Study(
    title='Mixtures of experts in a small LLaMA',
    page='docs/en/methods/moe_language.md',
    runs=[
        Run('dense'),
        *(
            Run(
                f'{projection}-{experts}',
                options=dict(projection=projection, experts=experts),
                against='dense',
            )
            for projection, experts in (
                ('gate', 4),
                ('up', 4),
                ('down', 4),
                ('up', 8),
            )
        ),
        Run(
            'up-4-unbalanced',
            options={'projection': 'up', 'experts': 4, 'aux-loss-coef': 0},
            against='up-4',
        ),
    ],
    metrics={
        'loss': ('val/held_out/loss', 1),
        'parameters (M)': ('val/parameters', 1e-6),
        'least used expert': ('val/least_used_expert', 1),
        'most used expert': ('val/most_used_expert', 1),
        'dropped': ('val/dropped', 1),
        'balance': ('val/balance', 1),
    },
    digits=3,
    command=command,
)


def count() -> int:
    """Print parameters beside the published ones; 1 if any differs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    status = 0
    print(f'{"experts on":<12}{"experts":>8}{"parameters":>16}{"paper":>9}')
    for projection in ('gate', 'up', 'down'):
        for experts, published in PUBLISHED.items():
            if experts is None and projection != 'gate':
                continue
            with torch.device('meta'):
                model = LlamaForCausalLM(LlamaConfig(**LLAMA_1B))
            if experts:
                add_experts(model, projection, experts)
            number = sum(p.numel() for p in model.parameters())
            status |= round(number / 1e9, 2) != published
            name = projection if experts else 'none'
            print(
                f'{name:<12}{experts or 1:>8}{number:>16,}{published:>8.2f}B'
            )
    return int(status)


def load_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Load Python's manual as bytes.

    Returns:
        tuple[Tensor]: Nine tenths to train on, and the rest.
    """
    from pydoc_data.topics import topics

    text = '\n'.join(topics[name] for name in sorted(topics))
    data = torch.tensor(list(text.encode('utf-8')))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


@torch.no_grad()
def evaluate(model: torch.nn.Module, data: torch.Tensor) -> dict:
    """Compute the loss in nats per letter, and the use of experts.

    Args:
        model (nn.Module): Left in training mode.
        data (Tensor): Text; 128 chunks of it are evaluated.

    Returns:
        dict[str, float]: ``held_out/loss``; with experts the smallest and
        the largest share of an expert, of all layers.
    """
    model.eval()
    length = model.config.max_position_embeddings
    batch = data[: len(data) // length * length].view(-1, length)[:128]
    result = {'held_out/loss': model(batch, labels=batch).loss.item()}
    shares = [s for use in expert_load(model).values() for s in use['load']]
    if shares:
        result |= dict(
            least_used_expert=min(shares), most_used_expert=max(shares)
        )
    model.train()
    return result


def train(args: argparse.Namespace) -> int:
    """Train a model with a plain loop; log as MMEngine does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    if args.experts:
        add_experts(
            model,
            args.projection,
            args.experts,
            aux_loss_coef=args.aux_loss_coef,
            init='fresh',
        )
    text, held_out = load_text()
    generator = torch.Generator().manual_seed(args.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARMUP)
            * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        ),
    )
    length, dropped = SMALL['max_position_embeddings'], 0.0
    path = args.work_dir / 'train' / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open('w') as log:

        def write(step, **values):
            log.write(json.dumps(dict(values, step=step)) + '\n')

        write(0, **evaluate(model, held_out))
        for step in range(1, args.steps + 1):
            begin = time.perf_counter()
            starts = torch.randint(
                len(text) - length, (BATCH, 1), generator=generator
            )
            batch = text[starts + torch.arange(length)]
            loss = model(batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            uses = expert_load(model).values()
            dropped += sum(u['dropped'] / len(uses) for u in uses)
            seconds = time.perf_counter() - begin
            write(step, loss=loss.item(), time=seconds)
            if step % 50 == 0 and step < args.steps:
                write(step, **evaluate(model, held_out))
        last = dict(parameters=sum(p.numel() for p in model.parameters()))
        if args.experts:
            balance = auxiliary_loss(model).item()
            last['balance'] = balance / SMALL['num_hidden_layers']
            last['dropped'] = dropped / args.steps
        write(args.steps, **last, **evaluate(model, held_out))
    return 0


def parse_args(argv=None):
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    steps = parser.add_subparsers(dest='what', required=True)
    steps.add_parser('count', help='compare parameters with the paper')
    add = steps.add_parser('train', help='one run of the study').add_argument
    add('--work-dir', type=Path, required=True, help='folder of the log')
    add('--projection', choices=['gate', 'up', 'down'], help='with experts')
    add('--experts', type=int, default=0, help='(default: none)')
    add(
        '--aux-loss-coef',
        type=float,
        default=0.01,
        help='weight of the balance loss (default: %(default)s)',
    )
    add('--seed', type=int, default=0, help='of weights and batches')
    add('--steps', type=int, default=STEPS, help='(default: %(default)s)')
    return parser.parse_args(argv)


def main(argv=None):
    """Count or train; exit code 2 without transformers."""
    args = parse_args(argv)
    try:
        from transformers.utils import logging
    except ImportError:
        sys.stderr.write(
            'error: transformers is missing: pip install transformers\n'
        )
        return 2
    logging.set_verbosity_error()
    return count() if args.what == 'count' else train(args)


if __name__ == '__main__':
    sys.exit(main())

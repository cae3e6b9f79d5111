"""Mixtures of experts in a small LLaMA: parameters, training, balance.

    python tools/benchmarks/llama_moe.py count
    python tools/benchmarks/llama_moe.py train --out-dir OUT

`count` makes the LLaMA-1B of ParameterNet's paper on the meta device, which
takes no memory, and compares its parameters with the published ones. `train`
trains test-sized models, letter by letter, on the text of Python's own manual
(the module pydoc_data.topics, which comes with Python) with plain Hugging
Face code, and writes llama_moe.csv: a row for each model and seed. Needs
transformers.
"""

import argparse
import csv
import math
import statistics
import sys
from pathlib import Path

import torch

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
# Projection and number of experts; None is the model as it is.
MODELS = {
    'dense': None,
    'gate-4': ('gate', 4),
    'up-4': ('up', 4),
    'down-4': ('down', 4),
    'up-8': ('up', 8),
}
WARMUP = 20


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('what', choices=['count', 'train'])
    parser.add_argument(
        '--models',
        nargs='+',
        choices=list(MODELS),
        default=list(MODELS),
        help='what to train (default: all)',
    )
    add = parser.add_argument
    add('--steps', type=int, default=400, help='(default: %(default)s)')
    add('--batch', type=int, default=16, help='(default: %(default)s)')
    add('--lr', type=float, default=2e-3, help='(default: %(default)s)')
    add(
        '--seeds',
        type=int,
        nargs='+',
        default=[0, 1, 2],
        help='of weights and batches (default: %(default)s)',
    )
    add(
        '--aux-loss-coef',
        type=float,
        default=0.01,
        help='weight of the balance; 0 shows what it is for '
        '(default: %(default)s)',
    )
    add(
        '--out-dir',
        type=Path,
        default=Path('work_dirs/llama_moe'),
        help='folder of the CSV file (default: %(default)s)',
    )
    args = parser.parse_args(argv)
    if args.steps < 1 or args.batch < 1:
        parser.error('--steps and --batch are at least 1')
    return args


def count():
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


def letters():
    """Python's manual as bytes: for training and, its end, for evaluation.

    Returns:
        tuple[Tensor]: Whole numbers below 256, nine tenths and one tenth.
    """
    from pydoc_data.topics import topics

    text = '\n'.join(topics[name] for name in sorted(topics))
    data = torch.tensor(list(text.encode('utf-8')))
    cut = len(data) * 9 // 10
    return data[:cut], data[cut:]


def pieces(data, number, length, generator):
    """Random pieces of a text, shape (number, length)."""
    starts = torch.randint(
        len(data) - length, (number, 1), generator=generator
    )
    return data[starts + torch.arange(length)]


@torch.no_grad()
def evaluate(model, data):
    """Mean loss in nats a letter over fixed pieces, and the use of experts.

    Returns:
        tuple: The loss, and of all layers the smallest and the largest share
        of an expert (None without experts).
    """
    model.eval()
    length = model.config.max_position_embeddings
    batch = data[: len(data) // length * length].view(-1, length)[:128]
    loss = model(batch, labels=batch).loss.item()
    shares = [s for use in expert_load(model).values() for s in use['load']]
    model.train()
    return loss, min(shares, default=None), max(shares, default=None)


def train(name, seed, args, data):
    """Train one model with a plain loop; return a row of the table."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    if MODELS[name]:
        projection, experts = MODELS[name]
        add_experts(
            model,
            projection,
            experts,
            aux_loss_coef=args.aux_loss_coef,
            init='fresh',
        )
    text, held_out = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1, (step + 1) / WARMUP)
            * (0.55 + 0.45 * math.cos(math.pi * step / args.steps))
        ),
    )
    first = evaluate(model, held_out)[0]
    dropped = 0.0
    for _ in range(args.steps):
        batch = pieces(
            text, args.batch, SMALL['max_position_embeddings'], generator
        )
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        uses = expert_load(model).values()
        if uses:
            dropped += sum(u['dropped'] for u in uses) / len(uses)
    balance = auxiliary_loss(model).item() if MODELS[name] else None
    loss, least, most = evaluate(model, held_out)
    return dict(
        model=name,
        seed=seed,
        parameters=sum(p.numel() for p in model.parameters()),
        steps=args.steps,
        aux_loss_coef=args.aux_loss_coef if MODELS[name] else '',
        loss_before=first,
        loss=loss,
        least_used_expert=least,
        most_used_expert=most,
        dropped=dropped / args.steps if MODELS[name] else None,
        balance=balance and balance / SMALL['num_hidden_layers'],
    )


def write_rows(rows, path):
    """Write the table."""
    with path.open('w', newline='', encoding='utf-8') as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator='\n')
        writer.writeheader()
        writer.writerows(rows)


def run_training(args):
    """Train all models, show them and write the table."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    data, rows = letters(), []
    args.out_dir.mkdir(parents=True, exist_ok=True)
    path = args.out_dir / 'llama_moe.csv'
    # Seed by seed, so that a run that is stopped has whole seeds.
    for seed in args.seeds:
        for name in args.models:
            row = train(name, seed, args, data)
            rows.append(
                {
                    key: f'{v:.4g}' if isinstance(v, float) else v
                    for key, v in row.items()
                }
            )
            print(', '.join(f'{k} {v}' for k, v in rows[-1].items()))
            sys.stdout.flush()
            write_rows(rows, path)
    for name in args.models:
        found = [float(r['loss']) for r in rows if r['model'] == name]
        spread = statistics.stdev(found) if len(found) > 1 else 0.0
        print(f'{name:<8} {statistics.mean(found):.4f} +- {spread:.4f}')
    print(f'wrote {path}')
    return 0


def main(argv=None):
    """Count or train; exit code 2 without transformers."""
    args = parse_args(argv)
    try:
        import transformers  # noqa: F401
    except ImportError:
        sys.stderr.write(
            'error: transformers is missing: pip install transformers\n'
        )
        return 2
    return count() if args.what == 'count' else run_training(args)


if __name__ == '__main__':
    sys.exit(main())

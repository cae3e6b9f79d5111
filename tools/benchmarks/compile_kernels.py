"""Compile the Triton kernels ahead of time, without a GPU.

Prints registers, spills and shared memory of each kernel at the shapes of the
papers, with the bytes and operations of one program (a group of a query) and
the side of the roofline that they are on. The exit code is 1 if a kernel
spills, needs more shared memory than the architecture has, or multiplies half
types without tensor cores from compute capability 8.0 on.

Example:
    python tools/benchmarks/compile_kernels.py --capability 80 --dtype float16
"""

import argparse
import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lors_plugin.ops.adaptive_mixing.triton import launch as mixing
from lors_plugin.ops.sampling_3d import triton_kernels as sampling

# P, C, Q, parameter groups, rank; two groups of channels, four levels.
SHAPES = {
    'adamixer': dict(P=32, C=64, Q=128, K=0, R=1),
    'lors-k1': dict(P=64, C=128, Q=128, K=1, R=16),
    'lors-k3': dict(P=64, C=128, Q=128, K=3, R=16),
    'lors-r32': dict(P=64, C=128, Q=128, K=3, R=32),
}
SAMPLED = 'adamixer', 'lors-k3'  # the others sample as lors-k3
KERNELS = ('mix-fwd', 'mix-bwd', 'sample-fwd', 'sample-bwd')
DTYPES = dict(
    float16=(torch.float16, 'fp16', 2),
    bfloat16=(torch.bfloat16, 'bf16', 2),
    float32=(torch.float32, 'fp32', 4),
)
SHARED_LIMIT = {70: 96 * 1024, 80: 163 * 1024, 90: 227 * 1024}
# Operations per byte at which arithmetic and memory take equally long, from
# the data sheets of V100, A100 and H100 (SXM): float32 units below 8.0 and
# for float32, tensor cores else.
RIDGE = {
    (70, 4): 17,
    (70, 2): 17,
    (80, 4): 10,
    (80, 2): 156,
    (90, 4): 20,
    (90, 2): 295,
}


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, choices, text in (
        ('capability', sorted(SHARED_LIMIT), 'compute capabilities'),
        ('dtype', list(DTYPES), 'types; bfloat16 is for 80 and above'),
        ('shape', list(SHAPES), 'shapes of the decoders'),
        ('kernel', KERNELS, 'kernels'),
    ):
        parser.add_argument(
            f'--{name}',
            nargs='+',
            choices=choices,
            default=list(choices),
            type=type(choices[0]),
            help=f'{text} (default: all)',
        )
    parser.add_argument(
        '--markdown',
        metavar='FILE',
        help='write the table there, between the lines '
        '<!-- kernels --> and <!-- end -->',
    )
    return parser.parse_args(argv)


def type_of(kernel, dtype, cap):
    """Entry of DTYPES in which a kernel reads and writes."""
    kind = DTYPES[dtype][0]
    if kernel == 'mix-bwd' and mixing.backward_type(kind, cap) != kind:
        return DTYPES['float32']
    return DTYPES[dtype]


def prepare(kernel, shape, dtype, cap):
    """Return the function, its constants and the types of its pointers."""
    size, (kind, name, _) = SHAPES[shape], type_of(kernel, dtype, cap)
    types = dict(p_stats='*fp32', p_points='*fp32', p_0='*i32', num='i32')
    types.update(p_sizes='*i32', num_batch='i32', num_queries='i32')
    if kernel.startswith('sample'):
        backward = kernel == 'sample-bwd'
        half = backward and kind != torch.float32
        options = sampling.config(
            size['P'], 2, size['C'], (4, 8, 16, 32), half
        )
        types['p_grad'] = '*fp32'
        function = sampling.sampling_3d_fwd_kernel
        if backward:
            function = sampling.sampling_3d_bwd_kernel
    else:
        keys = ('P', 'C', 'Q')
        full = dict({k: size[k] for k in keys}, G=2)
        full.update(KC=size['K'], RC=size['R'], KS=size['K'], RS=size['R'])
        which = 'backward'
        function = mixing.adaptive_mixing_bwd_kernel
        if kernel == 'mix-fwd':
            function = mixing.adaptive_mixing_fwd_kernel
            which = 'forward'
            if not mixing.on_chip(full, kind, cap):
                function = mixing.adaptive_mixing_fwd_kernel_steps
                which, types['p_scratch'] = 'steps', '*fp32'
        options = mixing.config(full, kind, cap, which)
        if which != 'backward':
            options['EPS'] = 1e-5
    keys = ('num_warps', 'num_stages', 'maxnreg')
    launch = {k: options.pop(k) for k in keys if k in options}
    types = {n: types.get(n, f'*{name}') for n in function.arg_names}
    return function, options, types, launch


def source(function, constants, types):
    """Make the source that Triton compiles, by its version."""
    names = function.arg_names
    pointers = [i for i, n in enumerate(names) if n.startswith('p_')]
    accepts = inspect.signature(ASTSource).parameters
    if 'constexprs' in accepts:
        types = {n: 'constexpr' if n in constants else types[n] for n in names}
        aligned = {(i,): [['tt.divisibility', 16]] for i in pointers}
        return ASTSource(function, types, constants, aligned)
    from triton.backends.compiler import AttrsDescriptor

    hints = AttrsDescriptor.from_hints({i: 16 for i in pointers})
    types = {n: types[n] for n in names if n not in constants}
    return ASTSource(function, types, constants, hints)


def resources(cubin):
    """Registers and bytes of stack of a compiled kernel."""
    tool = Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump'
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'kernel.cubin')
        Path(path).write_bytes(cubin)
        text = subprocess.run(
            [str(tool), '--dump-resource-usage', path],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = dict(re.findall(r'(REG|STACK|LOCAL):(\d+)', text))
    return int(found['REG']), int(found['STACK']) + int(found['LOCAL'])


def traffic(kernel, shape, bytes_each):
    """Bytes and operations of one program, factors and cells read once.

    Factors belong to all queries and stay in the cache, so they count for
    nothing; the shares of their gradients are written and read once more.
    """
    s = SHAPES[shape]
    p, c, q, k, r = s['P'], s['C'], s['Q'], s['K'], s['R']
    kr = k * r
    if kernel.startswith('sample'):
        reads = p * 4 * 4 * c
        elements = reads + p * c
        work = 2 if kernel == 'sample-fwd' else 2 * 2
        return elements * bytes_each + p * 3 * 4, work * reads
    x, matrices, out, cores = p * c, c * c + q * p, q * c, 2 * k * r * r
    low = p * kr * (2 * c + r) + kr * (q * p + r * p)
    if kernel == 'mix-fwd':
        work = 2 * (p * c * c + q * p * c + low)
        return (x + matrices + out + cores) * bytes_each + 16, work
    shares = kr * (2 * c + q + p)
    elements = 2 * (x + matrices + cores + shares) + out
    work = 2 * (3 * (p * c * c + q * p * c) + 3 * low)
    return elements * bytes_each + 16, work


def measure(kernel, shape, dtype, cap):
    """Compile one kernel.

    Returns:
        dict: One row of the table, with ``problems``, a list of texts.
    """
    function, constants, types, launch = prepare(kernel, shape, dtype, cap)
    compiled = triton.compile(
        source(function, constants, types),
        target=GPUTarget('cuda', cap, 32),
        options=launch,
    )
    registers, stack = resources(compiled.asm['cubin'])
    ptx = compiled.asm['ptx']
    tensor_cores = len(re.findall(r'wgmma\.mma_async|mma\.sync', ptx))
    shared = compiled.metadata.shared
    problems = []
    if stack:
        problems.append(f'spills {stack} bytes')
    if shared > SHARED_LIMIT[cap]:
        problems.append(f'{shared} bytes of shared memory')
    half = dtype != 'float32' and cap >= 80 and kernel.startswith('mix')
    if half and not tensor_cores:
        problems.append('no tensor cores')
    each = type_of(kernel, dtype, cap)[2]
    moved, work = traffic(kernel, shape, each)
    ratio = work / moved
    return dict(
        kernel=kernel,
        shape=shape,
        dtype=dtype,
        capability=cap,
        warps=launch['num_warps'],
        registers=registers,
        spills=stack,
        shared=shared,
        tensor_cores=tensor_cores,
        bytes=moved,
        operations=work,
        bound='memory' if ratio < RIDGE[cap, each] else 'arithmetic',
        problems=problems,
    )


HEADER = (
    '| kernel | shape | type | sm | warps | registers | spills | '
    'shared, KiB | tensor-core instr. | KiB moved | MFLOP | FLOP per byte | '
    'bound by |'
)


def line(row):
    """One row of the table."""
    cells = (
        row['kernel'],
        row['shape'],
        row['dtype'],
        row['capability'],
        row['warps'],
        row['registers'],
        row['spills'],
        f'{row["shared"] / 1024:.0f}',
        row['tensor_cores'],
        f'{row["bytes"] / 1024:.0f}',
        f'{row["operations"] / 1e6:.2f}',
        f'{row["operations"] / row["bytes"]:.0f}',
        row['bound'],
    )
    return '| ' + ' | '.join(map(str, cells)) + ' |'


def write(path, lines):
    """Replace what is between the two marks of a file."""
    text = Path(path).read_text(encoding='utf-8')
    marks = '<!-- kernels -->', '<!-- end -->'
    if not all(mark in text for mark in marks):
        raise ValueError(f'{path} has no lines {marks[0]} and {marks[1]}')
    before, rest = text.split(marks[0], 1)
    after = rest.split(marks[1], 1)[1]
    table = '\n'.join(lines)
    text = f'{before}{marks[0]}\n\n{table}\n\n{marks[1]}{after}'
    Path(path).write_text(text, encoding='utf-8')


def main(argv=None):
    """Compile everything that was asked for."""
    args = parse_args(argv)
    rule = '|' + '---|' * (HEADER.count('|') - 1)
    lines, failed = [HEADER, rule], 0
    print(f'Triton {triton.__version__}\n{HEADER}\n{rule}')
    for kernel in args.kernel:
        for shape in args.shape:
            if kernel.startswith('sample') and shape not in SAMPLED:
                continue
            for cap in args.capability:
                for dtype in args.dtype:
                    if dtype == 'bfloat16' and cap < 80:
                        continue
                    row = measure(kernel, shape, dtype, cap)
                    lines.append(line(row))
                    note = ', '.join(row['problems'])
                    failed += bool(note)
                    mark = f'  <-- {note}' if note else ''
                    print(lines[-1] + mark, flush=True)
    if args.markdown:
        write(args.markdown, lines)
    print(f'{len(lines) - 2} kernels, {failed} with problems')
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(main())

"""Convert checkpoints of the original programs to this package, or back.

Class names and other meta data are kept, averaged (EMA) weights are taken
where there are any, optimizer state is dropped. Keys that are unknown or
missing are listed and nothing is written.

With --to-lors CONFIG a trained AdaMixer, of the original program or of this
package, becomes the LORS-AdaMixer of that config: shared weights and low-rank
parts are fitted to its mixing, all else is taken over. Train it some epochs
more: load_from=DST.

Files of MMCV's EMAHook hold two sets of weights and do not say which are the
averages. By its defaults they are the buffers `ema_*`, which are taken; where
it ran before the checkpoint was written (a priority above the usual one, as
`priority=49`), it had swapped them: use --no-ema.
"""

import argparse
import sys

import lors_plugin  # noqa: F401, first: it makes mmcv.ops importable


def parse_args(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('src', help='the checkpoint to read')
    parser.add_argument('dst', help='where to write the converted one')
    parser.add_argument(
        '--source',
        choices=['auto', 'adamixer', 'lors', 'parameternet'],
        default='auto',
        help='the original program (default: told from the keys)',
    )
    parser.add_argument(
        '--reverse',
        action='store_true',
        help='from this package to the layout of the original program',
    )
    parser.add_argument(
        '--no-ema',
        action='store_true',
        help='take the plain weights even if there are averaged ones',
    )
    parser.add_argument(
        '--config',
        help='load the weights into the model of this config before anything '
        'is written, which checks their shapes too; needed for no backbone, '
        'but the only check of one that is neither ResNet(XT) nor Swin',
    )
    parser.add_argument(
        '--to-lors',
        metavar='CONFIG',
        help='fit a LORS-AdaMixer to an AdaMixer: the config of the former, '
        'with as many groups and points as SRC has',
    )
    parser.add_argument(
        '--images',
        type=int,
        default=100,
        metavar='N',
        help='with --to-lors: images of its training data on which the '
        'queries of each stage are recorded; 0 needs no data and fits to the '
        'norm in front of the mixing (default: %(default)s)',
    )
    parser.add_argument(
        '--trust',
        action='store_true',
        help='allow SRC to run code of its own while it is read; only for '
        'files from people you trust',
    )
    args = parser.parse_args(argv)
    if args.to_lors and (args.reverse or args.config):
        parser.error('--to-lors goes with neither --reverse nor --config')
    if args.images < 0:
        parser.error(f'--images {args.images} must not be negative')
    return args


def check_fits(state, path):
    """Load weights into the model of a config, strictly."""
    from mmengine.config import Config
    from mmengine.registry import MODELS, DefaultScope

    from lors_plugin.checkpoints import ConversionError
    from lors_plugin.config_file import find_config

    config = Config.fromfile(find_config(path))
    scope = config.get('default_scope', 'mmdet')
    with DefaultScope.overwrite_default_scope(scope):
        model = MODELS.build(config.model)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError(f'{path} does not fit: {error}') from error


def check_direction(state, source, args):
    """Refuse a file that has the layout it would be converted to."""
    from lors_plugin.checkpoints import ConversionError, is_converted

    ours = is_converted(state, source)
    if ours and not args.reverse:
        raise ConversionError(
            f'{args.src} has the layout of this package already; use it as '
            'it is (--reverse converts to that of the original program)'
        )
    if args.reverse and not ours:
        raise ConversionError(
            f'{args.src} has the layout of the original program already; '
            'leave --reverse out to convert it to that of this package'
        )


def check_backbone(state, config):
    """Refuse a file without one; warn of one that nothing is known of."""
    from lors_plugin.checkpoints import (
        ConversionError,
        backbone_keys,
        backbone_problems,
    )

    keys = backbone_keys(state)
    if not keys:
        raise ConversionError('missing keys: there is no backbone')
    if backbone_problems(keys).kind is None and not config:
        sys.stderr.write(
            'warning: the backbone is neither a ResNet(XT) nor a Swin of '
            'MMDetection; its keys are taken over as they are, and only '
            '--config CONFIG checks them\n'
        )


def fit_lors(state, args):
    """Fit the model of a config to an AdaMixer; return weights, a table."""
    from lors_plugin.adamixer import LORSAdaMixerDecoder, to_lors
    from lors_plugin.build import build_model, load_config
    from lors_plugin.checkpoints import ConversionError
    from lors_plugin.utils import text_table

    cfg = load_config(args.to_lors)
    target = build_model(cfg)
    decoder = getattr(target, 'decoder', None)
    if not isinstance(decoder, LORSAdaMixerDecoder):
        raise ConversionError(f'{args.to_lors} has no LORSAdaMixerDecoder')
    source = build_model(dict(cfg, model=adamixer_of(cfg.model, decoder)))
    try:
        source.load_state_dict(state)
    except RuntimeError as error:
        raise ConversionError(
            f'{args.src} is no AdaMixer of the sizes of {args.to_lors} '
            f'(num_groups, in_points, out_points, num_stages ...): {error}'
        ) from error
    batches = ()
    if args.images:
        from mmengine.registry import DefaultScope
        from mmengine.runner import Runner

        scope = cfg.get('default_scope', 'mmdet')
        with DefaultScope.overwrite_default_scope(scope):
            batches = Runner.build_dataloader(cfg.train_dataloader, seed=0)
    errors = to_lors(source, target, batches, args.images)
    rows = [('stage', 'channel', 'spatial', 'projection')]
    for number, error in enumerate(errors):
        values = error.channel, error.spatial, error.projection
        rows.append((number, *(f'{100 * value:.1f} %' for value in values)))
    return target.state_dict(), text_table(rows, '>')


def adamixer_of(model, decoder):
    """Config of the AdaMixer that has the sizes of a LORS-AdaMixer."""
    from lors_plugin.adamixer.decoder import LORS_OPTIONS

    options = {k: v for k, v in model.decoder.items() if k not in LORS_OPTIONS}
    options.update(
        type='lors_plugin.AdaMixerDecoder',
        num_groups=decoder.num_groups,
        in_points=decoder.in_points,
    )
    return dict(model, decoder=options)


def meta_of(content, reverse):
    """Meta data, with class names where the old framework looks for them."""
    meta = dict(content.get('meta') or {})
    if reverse:
        for name in ('classes', 'palette'):
            value = (meta.get('dataset_meta') or {}).get(name)
            if value is not None:
                meta.setdefault(name.upper(), value)
    return meta


def convert(args):
    """Do what the arguments say; return a sentence about it."""
    from lors_plugin.checkpoints import (
        ConversionError,
        guess_source,
        is_converted,
        load_checkpoint_file,
        save_checkpoint_file,
        to_lors_plugin,
        to_original,
        weights_of,
    )

    content = load_checkpoint_file(args.src, args.trust)
    state = weights_of(content, not args.no_ema, args.src)
    source = args.source
    if source == 'auto':
        source = guess_source(state)
    if args.to_lors:
        if source != 'adamixer':
            raise ConversionError(
                f'{args.src} is no AdaMixer ({source}); --to-lors takes one'
            )
        if not is_converted(state, source):
            state = to_lors_plugin(state, source)
        fitted, table = fit_lors(state, args)
        save_checkpoint_file(
            dict(meta=meta_of(content, False), state_dict=fitted), args.dst
        )
        return (
            f'relative errors of the fit, stage by stage:\n{table}\n'
            f'LORS fitted to AdaMixer: {args.dst}\nTrain it some epochs '
            f'more: tools/train.py {args.to_lors} --cfg-options '
            f'load_from={args.dst}'
        )
    check_direction(state, source, args)
    if source != 'parameternet':
        check_backbone(state, args.config)
    converter = to_original if args.reverse else to_lors_plugin
    converted = converter(state, source, check_backbone=not args.config)
    if args.config:
        check_fits(state if args.reverse else converted, args.config)
    meta = meta_of(content, args.reverse)
    save_checkpoint_file(dict(meta=meta, state_dict=converted), args.dst)
    direction = 'to' if args.reverse else 'from'
    return (
        f'{len(converted)} weights converted {direction} {source}: {args.dst}'
    )


def main(argv=None):
    """Convert one file."""
    from lors_plugin.compat import read_safely

    args = parse_args(argv)
    read_safely(args.trust)
    try:
        print(convert(args))
    except (ValueError, OSError) as error:
        sys.stderr.write(f'error: {error}\nnothing was written\n')
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())

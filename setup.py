"""Packaging of ``lors_plugin``.

The wheel carries ``configs``, ``tools`` and ``model-index.yml`` inside the
package as ``lors_plugin/.mim``, which is where ``mim`` looks for them. An
editable install links to them instead.

The host packages (MMEngine, MMCV, MMDetection, MMPretrain) are no install
requirements: the forks and the original packages are different
distributions with the same import names, and requiring one kind would
overwrite the other. ``pip install lors_plugin[onedl]`` names the forks.

``lors_plugin/_cpu.so`` is compiled code for CPUs. Where the compiler is
missing or fails, the package is installed without it and does the same in
plain PyTorch, more slowly.
"""

import os
import re
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = 'lors_plugin'
MIM_ITEMS = ('configs', 'tools', 'model-index.yml')
# A link or an image in Markdown whose target is in the repository.
RELATIVE = r'(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)'
IMAGE = r'!\[[^\]]*\]\((?!\w+:)[^)]*\)'
# Of ``tools``, what is for a checkout: it installs, measures, documents or
# checks this project.
CHECKOUT_ONLY = (
    'benchmarks', 'build_docs.sh', 'gpu_check.sh', 'lint', 'quickstart.sh',
    'run_tests.sh', 'setup_env.sh', 'studies',
)  # fmt: skip


def read_version():
    """Read the version without importing the package."""
    scope = {}
    exec((ROOT / PACKAGE / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def read_readme():
    """Return the README, or nothing where it is not there.

    Its relative links lead nowhere outside the repository. They become
    absolute where LORS_PLUGIN_HOME names the repository's web address with
    branch, and plain text otherwise.
    """
    readme = ROOT / 'README.md'
    if not readme.is_file():
        return ''
    text = readme.read_text(encoding='utf-8')
    home = os.environ.get('LORS_PLUGIN_HOME', '').rstrip('/')
    if home:
        return re.sub(RELATIVE, rf'\1[\2]({home}/\3)', text)
    text = re.sub(rf'(?m)^{IMAGE}\n+(\*[^*]+\*\n+)?', '', text)
    return re.sub(RELATIVE, r'\2', text)


def read_requirements(name):
    """Return the requirements in ``requirements/<name>.txt``."""
    lines = (
        (ROOT / 'requirements' / f'{name}.txt')
        .read_text(encoding='utf-8')
        .splitlines()
    )
    lines = [line.split('#')[0].strip() for line in lines]
    return [line for line in lines if line]


def ignore_files(folder, names):
    """Say what of a folder is not copied, as ``shutil.copytree`` asks."""
    ignored = shutil.ignore_patterns('__pycache__', '*.pyc')(folder, names)
    if Path(folder) == ROOT / 'tools':
        ignored.update(CHECKOUT_ONLY)
    return ignored


def place_mim_items(target, link):
    """Put what ``mim`` needs into the directory ``target``.

    Args:
        target (Path): The ``.mim`` directory, replaced as a whole.
        link (bool): Whether to link to the checkout rather than to copy.
    """
    if target.is_symlink() or target.is_file():
        target.unlink()
    elif target.is_dir():
        shutil.rmtree(target)
    target.mkdir(parents=True)
    for name in MIM_ITEMS:
        source = ROOT / name
        if not source.exists():
            continue
        if link:
            try:
                (target / name).symlink_to(source, source.is_dir())
                continue
            except OSError:
                pass  # a file system without links: copy
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignore_files)
        else:
            shutil.copy2(source, target / name)


class BuildPyWithMim(build_py):
    """Build the package and place what ``mim`` needs beside it."""

    def run(self):
        super().run()
        if getattr(self, 'editable_mode', False):
            place_mim_items(ROOT / PACKAGE / '.mim', link=True)
        else:
            place_mim_items(
                Path(self.build_lib) / PACKAGE / '.mim', link=False
            )


class BuildLibrary(build_ext):
    """Compile what ``ctypes`` loads: no module of one Python version."""

    def get_ext_filename(self, fullname):
        """One name for all versions of Python."""
        return str(Path(*fullname.split('.'))) + '.so'

    def build_extension(self, ext):
        """Compile, and let the loader know a whole file and its sources."""
        super().build_extension(ext)
        digest = LOADER['hash_sources'](ROOT / PACKAGE / 'csrc')
        LOADER['seal'](Path(self.get_ext_fullpath(ext.name)), digest)


class Wheel(bdist_wheel):
    """Name what the wheel is tied to: the platform, no version of Python.

    Where the compiler failed, it is not even that.
    """

    def get_tag(self):
        """Return the tags of Python, its interface and the platform."""
        library = Path(self.bdist_dir) / PACKAGE / '_cpu.so'
        platform = super().get_tag()[2] if library.is_file() else 'any'
        return 'py3', 'none', platform


# What knows the library's flags and file format, without importing torch.
LOADER = runpy.run_path(str(ROOT / PACKAGE / 'ops' / 'cpu_library.py'))


def describe_library():
    """Say how the compiled code is built."""
    # Relative, as setuptools wants them.
    sources = Path(PACKAGE, 'csrc')
    return Extension(
        f'{PACKAGE}._cpu',
        [str(sources / 'mixing.cpp')],
        depends=[
            'setup.py',
            *(str(p.relative_to(ROOT)) for p in (ROOT / sources).iterdir()),
        ],
        extra_compile_args=LOADER['FLAGS'],
        extra_link_args=['-fopenmp'],
        language='c++',
        optional=True,
    )


setup(
    name='lors-plugin',
    version=read_version(),
    description='AdaMixer and LORS (low-rank residual structure) for '
    'MMDetection',
    long_description=read_readme(),
    long_description_content_type='text/markdown',
    author='lors_plugin contributors',
    license='Apache-2.0',
    license_files=['LICENSE'],
    keywords='computer vision, object detection, low-rank, OpenMMLab',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    packages=find_packages(include=[PACKAGE, f'{PACKAGE}.*']),
    include_package_data=False,
    entry_points={'console_scripts': ['lors_plugin=lors_plugin.run:main']},
    python_requires='>=3.10',
    install_requires=read_requirements('runtime'),
    extras_require={
        'onedl': read_requirements('mminstall'),
        'optional': read_requirements('optional'),
        'deploy': read_requirements('deploy'),
        'serve': read_requirements('serve'),
        # The tests build the documentation.
        'tests': read_requirements('tests') + read_requirements('docs'),
        'docs': read_requirements('docs'),
        'lint': read_requirements('lint'),
    },
    ext_modules=[describe_library()],
    cmdclass={
        'bdist_wheel': Wheel,
        'build_ext': BuildLibrary,
        'build_py': BuildPyWithMim,
    },
    zip_safe=False,
)

"""Experts in a LLaMA of Hugging Face: placed, trained, saved, counted."""

import copy

import pytest
import torch
from torch import nn

from lors_plugin.language import (
    SwitchLinear,
    add_experts,
    auxiliary_loss,
    expert_layers,
    expert_load,
    load_with_experts,
)

transformers = pytest.importorskip('transformers')


def llama(seed=0, kind='LlamaForCausalLM', **options):
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = transformers.LlamaConfig(**{**sizes, **options})
    return getattr(transformers, kind)(config)


@pytest.fixture
def text():
    torch.manual_seed(1)
    return torch.randint(3, 31, (3, 12))


@pytest.mark.parametrize('projection', ['gate', 'up', 'down'])
def test_a_copy_starts_close_to_what_was_there(projection, text):
    model = llama().eval()
    wanted = model(text).logits
    names = add_experts(model, projection, num_experts=3)
    assert names == [
        f'model.layers.{i}.mlp.{projection}_proj' for i in range(2)
    ]
    assert list(expert_layers(model)) == names
    error = (model(text).logits - wanted).norm() / wanted.norm()
    assert error < 0.02


def test_one_expert_is_the_model_itself(text):
    model = llama().eval()
    wanted = model(text).logits
    add_experts(model, num_experts=1)
    torch.testing.assert_close(model(text).logits, wanted)


def test_loss_holds_the_balance_in_training_only(text):
    model = llama()
    add_experts(model, aux_loss_coef=0.5)
    plain = model.eval()(text, labels=text).loss
    for layer in expert_layers(model).values():
        layer.capacity_factor = None
    loss = model.train()(text, labels=text).loss
    extra = auxiliary_loss(model)
    assert extra.item() >= 1.9  # 1 for each of two layers
    torch.testing.assert_close(loss, plain + 0.5 * extra)
    loss.backward()
    for layer in expert_layers(model).values():
        assert layer.router.weight.grad.any()
    assert model(text).loss is None


@pytest.mark.parametrize('task', ['CausalLM', 'SequenceClassification'])
@pytest.mark.parametrize('parts', [(3,), (2, 1), (1, 1, 1)])
def test_accumulated_batches_weigh_the_balance_once(text, task, parts):
    """With the number of labels as ``Trainer`` counts them."""
    model = llama(kind=f'LlamaFor{task}')
    add_experts(model, aux_loss_coef=1.0, capacity_factor=None)
    labels = text if task == 'CausalLM' else torch.tensor([0, 1, 0])
    total = (labels != -100).sum()
    found, extra, plain = 0, 0, 0
    for part, label in zip(text.split(parts), labels.split(parts)):
        options = dict(labels=label, num_items_in_batch=total)
        found += model.train()(part, **options).loss
        extra += auxiliary_loss(model) * len(part) / 3
        plain += model.eval()(part, **options).loss
    torch.testing.assert_close(found, plain + extra)
    assert 1.9 < extra < 2.3


def test_a_trainer_that_computes_the_loss_itself(text):
    """As with label smoothing, where the model gets no labels."""
    model = llama()
    add_experts(model)
    with pytest.warns(UserWarning, match='label_smoothing_factor'):
        model(text, num_items_in_batch=text.numel())


def test_a_tuple_holds_the_balance_too(text):
    model = llama()
    add_experts(model, aux_loss_coef=0.5)
    wanted = model(text, labels=text).loss
    found = model(text, labels=text, return_dict=False)
    torch.testing.assert_close(found[0], wanted)


@pytest.mark.parametrize('by_name', [True, False])
def test_a_mask_is_that_of_its_own_call(text, by_name):
    model = llama().eval()
    add_experts(model)
    plain = model.model(text).last_hidden_state
    mask = torch.ones_like(text)
    mask[0, :4] = 0
    if by_name:
        model(text, attention_mask=mask)
    else:
        model(text, mask)
    for layer in expert_layers(model).values():
        assert torch.equal(layer.token_mask, mask.bool())
    # The decoder alone, next: nothing is left of the mask.
    torch.testing.assert_close(model.model(text).last_hidden_state, plain)


def test_padding_takes_no_place(text):
    model = llama().eval()
    add_experts(model, eval_capacity_factor=4.0)
    wanted = model(text[:1, 4:]).logits
    mask = torch.ones(1, 12, dtype=torch.long)
    mask[:, :4] = 0
    padded = text[:1].masked_fill(mask == 0, 0)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = model(padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(out.logits[:, 4:], wanted)
    for use in expert_load(model).values():
        counts = [8 * share for share in use['load']]
        assert counts == pytest.approx([round(n) for n in counts])


def test_decoding_with_a_cache_equals_reading(text):
    model = llama().eval()
    add_experts(model, num_experts=3)
    made = model.generate(text[:2], max_new_tokens=4, do_sample=False)
    choices = model(made).logits.argmax(-1)
    new = slice(text.shape[1], None)
    written = made[:, new]
    ended = (written == 2).cumsum(-1) > 0  # padding follows the end
    same = written == choices[:, text.shape[1] - 1 : -1]
    assert (same | ended).all()


def test_checkpointing(text):
    model = llama()
    add_experts(model, num_experts=3)
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable(dict(use_reentrant=False))
    for m in (model, twin):
        m(text, labels=text).loss.backward()
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a.grad, b.grad)
    twin.gradient_checkpointing_enable(dict(use_reentrant=True))
    twin.enable_input_require_grads()
    with pytest.raises(RuntimeError, match='use_reentrant'):
        twin(text, labels=text)


def test_saved_and_loaded(text, tmp_path):
    model = llama().eval()
    add_experts(model, 'gate', 3, aux_loss_coef=0.3, layers=[-1])
    model.save_pretrained(tmp_path / 'a')
    again = load_with_experts(tmp_path / 'a').eval()
    assert type(again) is transformers.LlamaForCausalLM
    assert list(expert_layers(again)) == ['model.layers.1.mlp.gate_proj']
    torch.testing.assert_close(again(text).logits, model(text).logits)
    losses = [m.train()(text, labels=text).loss for m in (model, again)]
    torch.testing.assert_close(*losses)
    again.save_pretrained(tmp_path / 'b')
    twice = load_with_experts(tmp_path / 'b', dtype=torch.bfloat16)
    assert twice.dtype == torch.bfloat16
    # Without experts the shapes do not fit, so nothing goes wrong silently.
    with pytest.raises(RuntimeError, match='size mismatch'):
        transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'a')
    llama().save_pretrained(tmp_path / 'plain')
    with pytest.raises(ValueError, match='add_experts'):
        load_with_experts(tmp_path / 'plain')


@pytest.mark.parametrize(
    'options, word',
    [
        (dict(projection='q'), 'projection'),
        (dict(init='zero'), 'init'),
        (dict(num_experts=0), 'num_experts'),
        (dict(layers=[2]), '2 blocks'),
    ],
)
def test_wrong_options_leave_the_model_alone(options, word, text):
    model = llama()
    with pytest.raises(ValueError, match=word):
        add_experts(model, **options)
    assert not expert_layers(model) and not model._forward_hooks


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match='up_proj'):
        add_experts(nn.Sequential(nn.Linear(2, 2)))
    model = llama()
    add_experts(model)
    with pytest.raises(ValueError, match='already'):
        add_experts(model)
    with pytest.raises(ValueError, match='no layer with experts'):
        auxiliary_loss(llama())


@pytest.mark.parametrize('projection', ['gate', 'up', 'down'])
def test_parameters_of_the_1b_model(projection):
    """The published 0.94B, 1.54B and 2.35B."""
    sizes = dict(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=12,
        num_attention_heads=16,
    )
    counts = []
    for experts in (None, 4, 8):
        with torch.device('meta'):
            model = llama(**sizes)
        if experts:
            add_experts(model, projection, experts)
            layer = next(iter(expert_layers(model).values()))
            assert isinstance(layer, SwitchLinear) and layer.weight.is_meta
        counts.append(sum(p.numel() for p in model.parameters()))
    assert [round(n / 1e9, 2) for n in counts] == [0.94, 1.54, 2.35]


def test_fresh_experts_have_the_spread_of_the_model():
    model = llama(hidden_size=64, intermediate_size=128)
    add_experts(model, init='fresh')
    for layer in expert_layers(model).values():
        std = float(layer.weight.std())
        assert abs(std - model.config.initializer_range) < 1e-3


def test_trainer_learns(tmp_path):
    pytest.importorskip('accelerate')
    model = llama()
    add_experts(model)
    rows = [dict(input_ids=(r := torch.arange(i, i + 8) % 31), labels=r)
            for i in range(16)]  # fmt: skip
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, args, train_dataset=rows)
    trainer.train()
    losses = [e['loss'] for e in trainer.state.log_history if 'loss' in e]
    assert losses[-1] < losses[0]

// What a run wrote at its evaluations, at a step beside another.

import {exportable} from './export.js';
import * as state from './state.js';
import {card, choice, h, notice} from './ui.js';

/** all(): [{step, texts}], rising. `show(step)` shows what was written then, or last before; `update()` follows new ones. */
export function samplesCard({all, signal}) {
  const element = card('Samples', 'What the model wrote at the chosen step, as it was written, beside another step.');
  element.classList.add('wide');
  const place = h('div'), tools = h('div.row');
  element.body.append(tools, place);
  exportable(element, {name: 'samples', rows: () => [['step', 'sample', 'text'],
    ...all().flatMap(({step, texts}) => texts.map((text, i) => [step, i + 1, text]))]});
  let chosen = null, offered = '';

  /** The step to the left: the address', else the first. */
  function beside() {
    const wanted = state.number('beside', all()[0]?.step);
    return all().find(({step}) => step === wanted) ?? all()[0];
  }

  function offer() {
    const steps = all().map(({step}) => step);
    const key = `${steps} ${beside()?.step}`;
    if (key === offered) return;
    offered = key;
    tools.replaceChildren(choice({label: 'Beside it', value: beside()?.step, options: steps.map(step => [step, `step ${step.toLocaleString('en')}`]),
      onInput: step => state.set({beside: step})}));
  }

  function paint() {
    if (!all().length) {
      tools.replaceChildren();
      offered = '';
      return void place.replaceChildren(notice('Nothing was written yet.'));
    }
    offer();
    const left = beside(), right = all().findLast(({step}) => step <= (chosen ?? Infinity)) ?? all()[0];
    const count = Math.max(left.texts.length, right.texts.length);
    const text = (section, i, hook) => h('div', {}, h('h3', {}, `Step ${section.step.toLocaleString('en')}, sample ${i + 1}`),
      h('pre.sample', {'data-test': hook, 'data-step': section.step}, section.texts[i] ?? ''));
    place.replaceChildren(...Array.from({length: count}, (_, i) => h('div.split.pair', {}, text(left, i, 'sample-beside'), text(right, i, 'sample'))));
  }

  state.on(['beside'], paint, signal);
  return {element, update: paint, show(step) {
    chosen = step;
    paint();
  }};
}

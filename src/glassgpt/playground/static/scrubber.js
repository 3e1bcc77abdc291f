// Steps of a run, gone through by a slider, by keys, or one after the other.

import {checkbox, h} from './ui.js';

const EACH_MS = 450;

/**
 * steps(): those that there are, rising. chosen(): the step of the address, or null for the newest, whichever that is. onChoose(step or
 * null). shown(): a promise of the step's being shown, awaited while playing. The element's `update()` follows a change of any of these,
 * `step()` is the step that is shown, null where there is none.
 */
export function scrubber({steps, chosen, onChoose, shown, signal}) {
  const input = h('input', {type: 'range', min: 0, step: 1, 'aria-label': 'Step', 'data-test': 'step-range', oninput() {
    const wanted = Number(input.value);
    stop();
    choose(wanted);
  }});
  const output = h('output', {'data-test': 'step'});
  const back = h('button', {type: 'button', title: 'The step before', 'aria-label': 'The step before', onclick: () => go(-1)}, '‹');
  const on = h('button', {type: 'button', title: 'The next step', 'aria-label': 'The next step', onclick: () => go(1)}, '›');
  const play = h('button', {type: 'button', 'data-test': 'play', onclick: () => (isPlaying() ? stop() : start())}, '▶');
  const newest = checkbox({label: 'follow the newest', checked: true, onInput: isOn => {
    stop();
    onChoose(isOn ? null : step());
  }});
  newest.control.dataset.test = 'follow-newest';
  const element = h('div.row.scrubber', {}, play, back, input, on, output, newest);
  let playing = null;  // aborts when it is to stop

  /** The step of the address, or the nearest before it. */
  function index() {
    const all = steps(), wanted = chosen();
    if (wanted === null) return all.length - 1;
    return Math.max(0, all.findLastIndex(each => each <= wanted));
  }

  const step = () => steps()[index()] ?? null;
  const isPlaying = () => playing !== null;
  const choose = i => onChoose(steps()[i]);

  function go(by) {
    stop();
    choose(Math.min(steps().length - 1, Math.max(0, index() + by)));
  }

  function stop() {
    playing?.abort();
    playing = null;
    update();
  }

  async function start() {
    const mine = playing = new AbortController();
    if (index() === steps().length - 1) choose(0);
    update();
    while (!mine.signal.aborted && !signal.aborted) {
      await Promise.all([shown(), new Promise(resolve => setTimeout(resolve, EACH_MS))]);
      if (mine.signal.aborted || signal.aborted) return;
      if (index() >= steps().length - 1) return stop();
      choose(index() + 1);
    }
  }

  function update() {
    const all = steps(), i = index();
    input.max = Math.max(0, all.length - 1);
    input.value = Math.max(0, i);
    input.setAttribute('aria-valuetext', `step ${all[i] ?? 'none'}`);
    output.textContent = all.length ? `step ${all[i].toLocaleString('en')} (${i + 1} of ${all.length})` : 'none yet';
    back.disabled = i <= 0;
    on.disabled = i >= all.length - 1;
    input.disabled = play.disabled = all.length < 2;
    newest.control.checked = chosen() === null;
    play.textContent = isPlaying() ? '❚❚' : '▶';
    play.title = isPlaying() ? 'Stop' : 'Play';
    play.setAttribute('aria-label', play.title);
  }

  signal.addEventListener('abort', () => playing?.abort());
  update();
  return Object.assign(element, {update, step, index});
}

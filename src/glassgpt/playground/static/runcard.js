// How a run stands.

import {bar, card, facts, h, notice, short} from './ui.js';

const STATES = {
  running: 'running', finished: 'finished', failed: 'failed', stopped: 'stopped: its process is gone; `glassgpt train --resume` goes on with it',
  interrupted: 'interrupted; `glassgpt train --resume` goes on with it', preempted: 'told to end by the system; `glassgpt resume` goes on with it',
};

/** The card: `show(run)` of its history and records, `connected(isOpen, why)`. */
export function runCard() {
  const element = card('The run');
  element.classList.add('wide');
  const lost = h('div', {role: 'status', 'data-test': 'connection'}), place = h('div');
  element.body.append(lost, place);
  let wasLost = false;
  return {
    element,
    connected(isOpen, why) {
      if (isOpen && !wasLost) return;
      wasLost = !isOpen;
      lost.replaceChildren(isOpen ? h('p.about', {}, 'The connection is there again.')
        : notice(why ?? 'The connection to the server is lost; this page tries to get it back. Is `glassgpt play` still running?', 'error'));
    },
    show(run) {
      place.replaceChildren(...told(run));
    },
  };
}

function told({history, records}) {
  const {status} = history;
  const step = records.last('step') ?? records.evaluations.at(-1)?.step ?? 0, steps = status.steps ?? null;
  const best = bestOf(records.evaluations);
  const left = status.state === 'running' && steps !== null ? records.secondsLeft(steps) : null;
  return [
    h('div.row', {}, h('strong', {'data-test': 'run-state', 'data-state': status.state ?? ''}, STATES[status.state] ?? status.state ?? 'state unknown'),
      h('span', {'data-test': 'run-step', 'data-step': step}, `step ${step.toLocaleString('en')}${steps === null ? '' : ` of ${steps.toLocaleString('en')}`}`),
      left === null ? null : h('span', {'data-test': 'time-left'}, `about ${duration(left)} left, at the pace of the last steps`)),
    steps === null ? null : bar(step / steps, 'var(--accent)'),
    status.error ? notice(status.error, 'error') : null,
    h('div.split.run-facts', {}, facts([
      ['last training loss', records.last('loss') === null ? '–' : records.last('loss').toFixed(4)],
      ['best validation loss', best ? `${best.val_loss.toFixed(4)}, step ${best.step.toLocaleString('en')}` : '–'],
      ['bits a byte there', best?.val_bits_per_byte ? best.val_bits_per_byte.toFixed(4) : '–'],
    ]), facts([
      ['tokens seen', h('span', {'data-test': 'tokens-seen'}, (records.last('tokens_seen') ?? 0).toLocaleString('en'))],
      ['time in training steps', duration(records.last('time') ?? 0)],
      ['checkpoints', history.checkpoints.length ? history.checkpoints.slice(-4).map(each => each.toLocaleString('en')).join(', ') : 'none yet'],
    ]), facts([
      ['parameters', history.environment.parameters ? short(history.environment.parameters) : '–'],
      ['device', [history.environment.device, history.environment.precision].filter(Boolean).join(', ') || '–'],
      ['processes', status.processes ?? history.environment.processes ?? '–'],
    ])),
  ].filter(Boolean);
}

function bestOf(evaluations) {
  const measured = evaluations.filter(({val_loss: loss}) => typeof loss === 'number');
  return measured.reduce((best, each) => (best === null || each.val_loss < best.val_loss ? each : best), null);
}

function duration(seconds) {
  const whole = Math.round(seconds), two = n => String(n).padStart(2, '0');
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)} h` : minutes ? `${minutes}:${two(whole % 60)} min` : `${whole} s`;
}

// Everything in this folder, in one import.
export * from './api.js';
export * from './attention.js';
export * from './cache.js';
export * from './colors.js';
export * from './dom.js';
export * from './edits.js';
export * from './format.js';
export * from './models.js';
export * from './painter.js';
export * from './paths.js';
export * from './records.js';
export * from './sampling.js';
export * as state from './state.js';
export * from './tokens.js';
export * from './ui.js';

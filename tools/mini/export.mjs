// Prints what only JavaScript packages hold, one JSON object per line: `node export.mjs icons|avatars|kinship …`.
import * as fs from 'fs';
import { createRequire } from 'module';
import { pathToFileURL } from 'url';
import * as path from 'path';

const [what, root, ...rest] = process.argv.slice(2);
const require = createRequire(path.join(root, 'index.js'));
const load = (name) => import(pathToFileURL(path.join(root, 'node_modules', name)).href);
const print = (value) => fs.writeSync(1, JSON.stringify(value) + '\n');

const THEMES = {
  outline: ['#333'],
  filled: ['#333'],
  'two-tone': ['#333', '#2F88FF'],
  'multi-color': ['#333', '#2F88FF', '#FFF', '#43CCF8'],
};

function icons() {
  const library = require('@icon-park/svg');
  for (const icon of require('@icon-park/svg/icons.json')) {
    const draw = library[icon.name.split('-').map((word) => word[0].toUpperCase() + word.slice(1)).join('')];
    if (draw === undefined) continue;
    for (const [theme, fill] of Object.entries(THEMES)) print({ ...icon, theme, svg: draw({ theme, size: 64, fill }) });
  }
}

async function avatars(family, count, options) {
  const { createAvatar } = await load('@dicebear/core/lib/index.js');
  const style = await load(`@dicebear/${family}/lib/index.js`);
  for (let index = 0; index < Number(count); index++) {
    const avatar = createAvatar(style, { seed: `mini-${family}-${index}`, size: 64, ...JSON.parse(options) });
    print({ index, svg: avatar.toString(), options: avatar.toJson().extra });
  }
}

function kinship() {
  const relationship = require('relationship.js');
  const steps = ['爸爸', '妈妈', '哥哥', '弟弟', '姐姐', '妹妹', '儿子', '女儿', '老公', '老婆'];
  let chains = [[]];
  for (let length = 1; length <= 3; length++) {
    chains = chains.flatMap((chain) => steps.map((step) => [...chain, step]));
    for (const chain of chains) {
      const wives = chain.filter((step) => step === '老公' || step === '老婆').length;
      if (wives > 1) continue;
      const names = relationship({ text: chain.join('的') });
      if (names.length > 0) print({ chain, names });
    }
  }
}

const COMMANDS = { icons, avatars, kinship };
await COMMANDS[what](...rest);
